// register.cc: RegisterCustomOps, which gives a session the operators of this library.
#include <map>
#include <string>

#include "dlrm_deploy/ops.h"
#include "ort/operators.h"

namespace dlrm_deploy {
namespace {

constexpr char kDomain[] = "dlrm_deploy";

// Every operator of the library.
constexpr OrtCustomOp* (*kOperators[])(const KernelPath&) = {
    MakeTableBatchedEmbeddingBagOp,
    MakeDotInteractionOp,
    MakeEmbeddingBagDotInteractionOp,
    MakeMlpOp,
    MakeMlpInt8Op,
};

// The operators on one kernel path, for every session that is opened while it is the one in use.
// They are never destroyed, see operators.h.
const Ort::CustomOpDomain& DomainOn(const KernelPath& path) {
  static const auto* const domains = [] {
    auto* made = new std::map<const KernelPath*, Ort::CustomOpDomain>;
    for (const KernelPath& each : AllKernelPaths()) {
      Ort::CustomOpDomain domain(kDomain);
      for (const auto make : kOperators) domain.Add(make(each));
      made->emplace(&each, std::move(domain));
    }
    return made;
  }();
  return domains->at(&path);
}

}  // namespace
}  // namespace dlrm_deploy

OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  using namespace dlrm_deploy;
  const OrtApi* api = base->GetApi(ORT_API_VERSION);
  if (api == nullptr) {
    // The C API only grows, so its first version can tell what is wrong.
    const std::string message = std::string("libdlrm_deploy_ops was built for ONNX Runtime 1.") +
                                std::to_string(ORT_API_VERSION) + " or newer, this one is " +
                                base->GetVersionString();
    return base->GetApi(1)->CreateStatus(ORT_FAIL, message.c_str());
  }
  Ort::InitApi(api);
  return Guarded([&]() -> Error {
    std::string error;
    const KernelPath* path = ChooseKernelPathFromEnvironment(&error);
    if (path == nullptr) return error;
    Ort::UnownedSessionOptions(options).Add(DomainOn(*path));
    return {};
  });
}
