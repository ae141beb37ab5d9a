// rank_bits.h: a set of positions that counts and finds its members by rank, in O(log n).
#ifndef DLRM_DEPLOY_TRACE_RANK_BITS_H_
#define DLRM_DEPLOY_TRACE_RANK_BITS_H_

#include <cstddef>
#include <cstdint>
#include <vector>

namespace dlrm_deploy {

// One bit a position, and a Fenwick tree over the counts of 512 bits each: 1.2 bits a position in
// all, so that the tree of a table of 10 million rows fits the caches. Positions are in [0, size).
class RankBits {
 public:
  explicit RankBits(size_t size);

  size_t count() const { return count_; }

  // The position must not be a member.
  void Insert(size_t position);
  // The position must be a member.
  void Erase(size_t position);
  // Members at higher positions.
  size_t CountAbove(size_t position) const;
  // The member that has `above` members above it; `above` < count().
  size_t FindFromTop(size_t above) const;
  // The lowest member that is at least `position`, or the size where there is none.
  size_t NextMember(size_t position) const;
  // Makes exactly [0, members) the members.
  void Reset(size_t members);

 private:
  static constexpr size_t kWordBits = 64;
  static constexpr size_t kBlockWords = 8;
  static constexpr size_t kBlockBits = kWordBits * kBlockWords;

  void Add(size_t block, int32_t change);

  size_t size_;
  size_t count_ = 0;
  std::vector<uint64_t> words_;
  std::vector<uint32_t> tree_;  // tree_[i], i >= 1: members of the blocks [i - lowest bit of i, i)
  size_t top_step_ = 1;         // the largest power of two that is at most the number of blocks
};

}  // namespace dlrm_deploy

#endif  // DLRM_DEPLOY_TRACE_RANK_BITS_H_
