// guarded_buffer.h: memory that ends, or begins, at a page nobody may touch, so that reading one
// byte past it crashes the test.
#ifndef DLRM_DEPLOY_TESTS_GUARDED_BUFFER_H_
#define DLRM_DEPLOY_TESTS_GUARDED_BUFFER_H_

#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <vector>

enum class Guard { kBehind, kBefore };

template <typename T>
class GuardedBuffer {
 public:
  explicit GuardedBuffer(const std::vector<T>& values, Guard guard = Guard::kBehind) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t bytes = values.size() * sizeof(T);
    const size_t usable = (bytes + page - 1) / page * page;
    total_ = usable + page;
    void* mapped =
        mmap(nullptr, total_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    base_ = static_cast<char*>(mapped);
    const size_t forbidden = guard == Guard::kBehind ? usable : 0;
    if (mapped == MAP_FAILED || mprotect(base_ + forbidden, page, PROT_NONE) != 0) std::abort();
    data_ = reinterpret_cast<T*>(base_ + (guard == Guard::kBehind ? usable - bytes : page));
    if (bytes > 0) std::memcpy(data_, values.data(), bytes);
  }
  GuardedBuffer(const GuardedBuffer&) = delete;
  GuardedBuffer& operator=(const GuardedBuffer&) = delete;
  ~GuardedBuffer() { munmap(base_, total_); }

  T* data() { return data_; }

 private:
  char* base_;
  size_t total_;
  T* data_;
};

#endif  // DLRM_DEPLOY_TESTS_GUARDED_BUFFER_H_
