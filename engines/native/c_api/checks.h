// checks.h: what is checked of the arguments that several of the plain C functions have.
#ifndef DLRM_DEPLOY_C_API_CHECKS_H_
#define DLRM_DEPLOY_C_API_CHECKS_H_

#include <cstdint>
#include <limits>
#include <string>

#include "kernels/error.h"

namespace dlrm_deploy {

constexpr int32_t kMostThreads = 1024;
constexpr int64_t kMostFloats = std::numeric_limits<int64_t>::max() / 16;

// a * b * c floats, or -1 when that is negative or too many to address.
inline int64_t CountFloats(int64_t a, int64_t b, int64_t c) {
  int64_t product;
  if (a < 0 || b < 0 || c < 0 || __builtin_mul_overflow(a, b, &product) ||
      __builtin_mul_overflow(product, c, &product) || product > kMostFloats) {
    return -1;
  }
  return product;
}

inline Error CheckThreads(int32_t threads) {
  if (threads >= 1 && threads <= kMostThreads) return {};
  return "threads is " + std::to_string(threads) + ", expected 1 to " +
         std::to_string(kMostThreads);
}

inline Error CheckCalibration(int32_t threads, double duration_ms, const double* result) {
  if (Error error = CheckThreads(threads)) return error;
  if (!(duration_ms > 0.0 && duration_ms <= 600e3)) {
    return "duration_ms is " + std::to_string(duration_ms) +
           ", expected more than 0, at most 600000";
  }
  if (result == nullptr) return std::string("result is NULL");
  return {};
}

}  // namespace dlrm_deploy

#endif  // DLRM_DEPLOY_C_API_CHECKS_H_
