#include "trace/lru_stack.h"

#include <numeric>
#include <string>

namespace dlrm_deploy {
namespace {

// Slots to push into before the stack is compacted, which takes time in proportion to its slots.
constexpr size_t kSpareSlots = 4096;

}  // namespace

Error StackDistances(const int64_t* lines, int64_t count, int64_t num_lines, int64_t* distances) {
  constexpr int64_t kNever = -1;
  std::vector<int64_t> latest(static_cast<size_t>(num_lines), kNever);
  RankBits is_latest(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    const int64_t line = lines[i];
    if (line < 0 || line >= num_lines) {
      return "line " + std::to_string(line) + " at position " + std::to_string(i) +
             " is outside [0, " + std::to_string(num_lines) + ")";
    }
    int64_t& before = latest[static_cast<size_t>(line)];
    if (before == kNever) {
      distances[i] = 0;
    } else {
      const size_t position = static_cast<size_t>(before);
      distances[i] = static_cast<int64_t>(is_latest.CountAbove(position)) + 1;
      is_latest.Erase(position);
    }
    is_latest.Insert(static_cast<size_t>(i));
    before = i;
  }
  return {};
}

LruStack::LruStack(int64_t lines, bool warm)
    : lines_(static_cast<size_t>(lines)),
      slots_(2 * lines_ + kSpareSlots),
      used_(2 * lines_ + kSpareSlots) {
  if (!warm) return;
  std::iota(slots_.begin(), slots_.begin() + static_cast<ptrdiff_t>(lines_), 0u);
  used_.Reset(lines_);
  next_ = lines_;
}

Error LruStack::Replay(const int64_t* distances, int64_t count, int64_t* lines,
                       int64_t* effective) {
  for (int64_t i = 0; i < count; ++i) {
    if (distances[i] < 0) {
      return "distance " + std::to_string(distances[i]) + " at position " + std::to_string(i) +
             " is negative";
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    const size_t seen = used_.count();
    size_t distance = static_cast<size_t>(distances[i]);
    if (distance > seen) distance = 0;
    uint32_t line = static_cast<uint32_t>(seen);
    if (distance == 0 && seen == lines_) distance = lines_;
    if (distance > 0) {
      const size_t slot = used_.FindFromTop(distance - 1);
      line = slots_[slot];
      used_.Erase(slot);
    }
    Push(line);
    lines[i] = line;
    if (effective != nullptr) effective[i] = static_cast<int64_t>(distance);
  }
  return {};
}

void LruStack::Push(uint32_t line) {
  if (next_ == slots_.size()) Compact();
  slots_[next_] = line;
  used_.Insert(next_);
  ++next_;
}

void LruStack::Compact() {
  size_t kept = 0;
  const size_t members = used_.count();
  for (size_t slot = 0; kept < members; ++slot) {
    slot = used_.NextMember(slot);
    slots_[kept++] = slots_[slot];
  }
  used_.Reset(members);
  next_ = members;
}

}  // namespace dlrm_deploy
