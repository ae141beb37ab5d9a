// lru_stack.h: stack distances of accesses, and accesses with given stack distances, in O(log n)
// each.
//
// The stack holds every line accessed so far, the latest on top. The distance of an access is the
// place of its line in it, counted from the top and from 1, and 0 where the line was never accessed
// before.
#ifndef DLRM_DEPLOY_TRACE_LRU_STACK_H_
#define DLRM_DEPLOY_TRACE_LRU_STACK_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/error.h"
#include "trace/rank_bits.h"

namespace dlrm_deploy {

// distances[i] of the access to lines[i], which is in [0, num_lines). May throw std::bad_alloc.
Error StackDistances(const int64_t* lines, int64_t count, int64_t num_lines, int64_t* distances);

// The stack of an endless trace over the lines 0 .. lines - 1, which are first accessed in that
// order.
class LruStack {
 public:
  static constexpr int64_t kMostLines = int64_t{1} << 31;

  // `lines` in [1, kMostLines]. Warm: every line is on the stack from the beginning, line 0 at the
  // bottom.
  LruStack(int64_t lines, bool warm);

  // The lines accessed with these distances. A distance that the stack does not hold yet, or 0,
  // accesses a new line; where there is none, the line at the bottom. `effective` (or NULL) gets
  // the distances as they came out. Where a distance is negative nothing is done.
  Error Replay(const int64_t* distances, int64_t count, int64_t* lines, int64_t* effective);

 private:
  void Push(uint32_t line);
  void Compact();

  size_t lines_;
  std::vector<uint32_t> slots_;  // line of each slot in use; higher slots are nearer to the top
  RankBits used_;
  size_t next_ = 0;
};

}  // namespace dlrm_deploy

#endif  // DLRM_DEPLOY_TRACE_LRU_STACK_H_
