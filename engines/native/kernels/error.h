// error.h: how kernels and operators say that something is wrong: text, or none for success.
#ifndef DLRM_DEPLOY_KERNELS_ERROR_H_
#define DLRM_DEPLOY_KERNELS_ERROR_H_

#include <optional>
#include <string>

namespace dlrm_deploy {

using Error = std::optional<std::string>;

}  // namespace dlrm_deploy

#endif  // DLRM_DEPLOY_KERNELS_ERROR_H_
