#include "trace/rank_bits.h"

#include <algorithm>

namespace dlrm_deploy {
namespace {

size_t CountBits(uint64_t word) { return static_cast<size_t>(__builtin_popcountll(word)); }

// Position of the set bit that has `below` set bits below it.
size_t FindBit(uint64_t word, size_t below) {
  size_t position = 0;
  for (unsigned width = 32; width > 0; width /= 2) {
    const size_t low = CountBits(word & ((uint64_t{1} << width) - 1));
    if (below >= low) {
      below -= low;
      word >>= width;
      position += width;
    }
  }
  return position;
}

}  // namespace

RankBits::RankBits(size_t size) : size_(size) {
  const size_t blocks = size / kBlockBits + 1;
  words_.resize(blocks * kBlockWords);
  tree_.resize(blocks + 1);
  while (top_step_ * 2 <= blocks) top_step_ *= 2;
}

void RankBits::Insert(size_t position) {
  words_[position / kWordBits] |= uint64_t{1} << (position % kWordBits);
  Add(position / kBlockBits, 1);
  ++count_;
}

void RankBits::Erase(size_t position) {
  words_[position / kWordBits] &= ~(uint64_t{1} << (position % kWordBits));
  Add(position / kBlockBits, -1);
  --count_;
}

size_t RankBits::CountAbove(size_t position) const {
  const size_t word = position / kWordBits;
  // The lowest bits up to and with `position`: a shift by 64 is not defined, so by one in two
  // steps.
  const uint64_t up_to = (uint64_t{2} << (position % kWordBits)) - 1;
  size_t below = CountBits(words_[word] & up_to);
  const size_t block = position / kBlockBits;
  for (size_t w = block * kBlockWords; w < word; ++w) below += CountBits(words_[w]);
  for (size_t i = block; i > 0; i &= i - 1) below += tree_[i];
  return count_ - below;
}

size_t RankBits::FindFromTop(size_t above) const {
  size_t below = count_ - 1 - above;
  size_t block = 0;
  for (size_t step = top_step_; step > 0; step /= 2) {
    if (block + step < tree_.size() && tree_[block + step] <= below) {
      block += step;
      below -= tree_[block];
    }
  }
  size_t word = block * kBlockWords;
  for (size_t bits = CountBits(words_[word]); below >= bits; bits = CountBits(words_[word])) {
    below -= bits;
    ++word;
  }
  return word * kWordBits + FindBit(words_[word], below);
}

size_t RankBits::NextMember(size_t position) const {
  if (position >= size_) return size_;
  size_t word = position / kWordBits;
  uint64_t rest = words_[word] & ~((uint64_t{1} << (position % kWordBits)) - 1);
  while (rest == 0) {
    if (++word == words_.size()) return size_;
    rest = words_[word];
  }
  return word * kWordBits + static_cast<size_t>(__builtin_ctzll(rest));
}

void RankBits::Reset(size_t members) {
  count_ = members;
  for (size_t w = 0; w < words_.size(); ++w) {
    const size_t first = w * kWordBits;
    const size_t bits = members > first ? std::min(members - first, kWordBits) : 0;
    words_[w] = bits == kWordBits ? ~uint64_t{0} : (uint64_t{1} << bits) - 1;
  }
  std::fill(tree_.begin(), tree_.end(), 0);
  for (size_t i = 1; i < tree_.size(); ++i) {
    const size_t first = (i - 1) * kBlockBits;
    tree_[i] += static_cast<uint32_t>(members > first ? std::min(members - first, kBlockBits) : 0);
    const size_t parent = i + (i & (~i + 1));
    if (parent < tree_.size()) tree_[parent] += tree_[i];
  }
}

void RankBits::Add(size_t block, int32_t change) {
  for (size_t i = block + 1; i < tree_.size(); i += i & (~i + 1)) {
    tree_[i] += static_cast<uint32_t>(change);
  }
}

}  // namespace dlrm_deploy
