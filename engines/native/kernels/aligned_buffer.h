// aligned_buffer.h: memory on cache lines that grows.
#ifndef DLRM_DEPLOY_KERNELS_ALIGNED_BUFFER_H_
#define DLRM_DEPLOY_KERNELS_ALIGNED_BUFFER_H_

#include <cstddef>
#include <memory>
#include <new>

namespace dlrm_deploy {

// Memory on cache lines that grows and never shrinks; its content does not outlive a growth.
class AlignedBuffer {
 public:
  // At least `bytes`, also where that is 0, or null when memory runs out.
  void* Reserve(size_t bytes) noexcept {
    if (bytes > bytes_ || memory_ == nullptr) {
      memory_.reset();
      bytes_ = 0;
      memory_.reset(::operator new(bytes, kAlignment, std::nothrow));
      if (memory_ != nullptr) bytes_ = bytes;
    }
    return memory_.get();
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Delete {
    void operator()(void* memory) const { ::operator delete(memory, kAlignment); }
  };
  std::unique_ptr<void, Delete> memory_;
  size_t bytes_ = 0;
};

}  // namespace dlrm_deploy

#endif  // DLRM_DEPLOY_KERNELS_ALIGNED_BUFFER_H_
