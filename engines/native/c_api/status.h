// status.h: how the plain C functions fail: nothing throws past them, and each thread's latest
// message is kept for dlrm_deploy_last_error().
#ifndef DLRM_DEPLOY_C_API_STATUS_H_
#define DLRM_DEPLOY_C_API_STATUS_H_

#include <exception>
#include <string>
#include <utility>

#include "dlrm_deploy/ops.h"

namespace dlrm_deploy {

inline std::string& LastError() {
  thread_local std::string message;
  return message;
}

inline dlrm_deploy_status Fail(dlrm_deploy_status status, std::string message) {
  LastError() = std::move(message);
  return status;
}

// Fail for a handler, past which not even a lack of memory for the message may throw.
inline dlrm_deploy_status FailCaught(const char* what) noexcept {
  try {
    LastError() = what;
  } catch (...) {
    LastError().clear();
  }
  return DLRM_DEPLOY_FAILED;
}

// Runs `body`, and turns what it throws into a status.
template <typename Body>
dlrm_deploy_status Guarded(const Body& body) {
  try {
    return body();
  } catch (const std::exception& error) {
    return FailCaught(error.what());
  } catch (...) {
    return FailCaught("unknown failure");
  }
}

}  // namespace dlrm_deploy

#endif  // DLRM_DEPLOY_C_API_STATUS_H_
