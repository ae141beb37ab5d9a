// trace.cc: the plain C functions of dlrm_deploy/trace.h. Nothing throws past this file.
#include "dlrm_deploy/trace.h"

#include <limits>
#include <string>

#include "c_api/status.h"
#include "trace/lru_stack.h"

using dlrm_deploy::Error;
using dlrm_deploy::Fail;
using dlrm_deploy::Guarded;
using dlrm_deploy::LruStack;

struct dlrm_deploy_stack {
  LruStack stack;
};

namespace {

constexpr int64_t kMostAccesses = std::numeric_limits<int64_t>::max() / 16;

Error CheckCount(const char* name, int64_t count) {
  if (count >= 0 && count <= kMostAccesses) return {};
  return std::string(name) + " is " + std::to_string(count) + ", expected 0 to " +
         std::to_string(kMostAccesses);
}

dlrm_deploy_status Status(const Error& error) {
  return error ? Fail(DLRM_DEPLOY_BAD_INPUT, *error) : DLRM_DEPLOY_OK;
}

}  // namespace

dlrm_deploy_status dlrm_deploy_stack_distances(const int64_t* lines, int64_t count,
                                               int64_t num_lines, int64_t* distances) {
  return Guarded([&] {
    Error error = CheckCount("count", count);
    if (!error && (num_lines < 0 || num_lines > LruStack::kMostLines)) {
      error = "num_lines is " + std::to_string(num_lines) + ", expected 0 to " +
              std::to_string(LruStack::kMostLines);
    }
    if (!error && count > 0 && (lines == nullptr || distances == nullptr)) {
      error = "lines or distances is NULL";
    }
    if (!error) error = dlrm_deploy::StackDistances(lines, count, num_lines, distances);
    return Status(error);
  });
}

dlrm_deploy_status dlrm_deploy_stack_create(int64_t lines, int32_t warm,
                                            dlrm_deploy_stack** stack) {
  return Guarded([&] {
    if (stack == nullptr) return Fail(DLRM_DEPLOY_BAD_INPUT, "stack is NULL");
    *stack = nullptr;
    if (lines < 1 || lines > LruStack::kMostLines) {
      return Fail(DLRM_DEPLOY_BAD_INPUT, "lines is " + std::to_string(lines) + ", expected 1 to " +
                                             std::to_string(LruStack::kMostLines));
    }
    if (warm != 0 && warm != 1) {
      return Fail(DLRM_DEPLOY_BAD_INPUT, "warm is " + std::to_string(warm) + ", expected 0 or 1");
    }
    *stack = new dlrm_deploy_stack{LruStack(lines, warm == 1)};
    return DLRM_DEPLOY_OK;
  });
}

dlrm_deploy_status dlrm_deploy_stack_replay(dlrm_deploy_stack* stack, const int64_t* distances,
                                            int64_t count, int64_t* lines, int64_t* effective) {
  return Guarded([&] {
    Error error = CheckCount("count", count);
    if (!error && stack == nullptr) error = "stack is NULL";
    if (!error && count > 0 && (lines == nullptr || distances == nullptr)) {
      error = "lines or distances is NULL";
    }
    if (!error) error = stack->stack.Replay(distances, count, lines, effective);
    return Status(error);
  });
}

void dlrm_deploy_stack_free(dlrm_deploy_stack* stack) { delete stack; }
