// What the emulator says when it stops a launch.

#include <algorithm>
#include <cstdio>

#include "device.h"

namespace cnnops::simt {

std::string text(const dim3& d) {
  return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
}

std::string text(const Where& where) {
  const std::string path = where.file_name();
  return path.substr(path.rfind('/') + 1) + ":" + std::to_string(where.line());
}

std::string place(const Block& block) { return std::string(device.kernel) + ", block " + text(block.index); }

std::string doing(const Thread& thread) {
  const auto waits = [&](const std::string& in) { return "waiting in " + in + " at " + text(thread.where); };
  const std::string name = thread.waits_in ? thread.waits_in : "";
  switch (thread.state) {
    case State::kReady:
      return "able to run";
    case State::kAtBarrier:
      return waits("__syncthreads");
    case State::kAtNamedBarrier: {
      const NamedBarrier& barrier = thread.block->named[thread.waits_for];
      return waits(name + " of barrier " + std::to_string(thread.waits_for) + ", to which " +
                   std::to_string(barrier.arrived) + " of " + std::to_string(barrier.threads) + " threads have come,");
    }
    case State::kAtClusterBarrier:
      return waits(name);
    case State::kAtGridBarrier:
      return waits(name + " for " + std::to_string(thread.waits_for) + " blocks");
    case State::kAtMbarrier: {
      const Mbarrier& barrier = *thread.mbarrier;
      return waits(name + " of parity " + std::to_string(thread.waits_for) + " (barrier at offset " +
                   std::to_string(barrier.block->memory.offset(barrier.word)) + ", phase " +
                   std::to_string(barrier.phase) + ", " + std::to_string(barrier.pending) + " of " +
                   std::to_string(barrier.count) + " arrivals and " + std::to_string(barrier.bytes) +
                   " bytes still to come)");
    }
    case State::kInCollective: {
      char mask[16];
      std::snprintf(mask, sizeof mask, "0x%08x", thread.waits_for);
      return waits(name + " with mask " + mask);
    }
    case State::kInStep:
      return waits(name + " of its warpgroup");
    case State::kExited:
      return "exited";
  }
  return "";
}

// What every thread is at, those of a block that do the same in one line.
std::string roll_call() {
  std::string out;
  for (unsigned rank = 0; rank < device.together; ++rank) {
    const Block& block = device.blocks[rank];
    std::vector<std::pair<std::string, std::string>> lines;  // what they do, who they are
    for (unsigned first = 0; first < device.thread_count;) {
      const std::string what = doing(block.threads[first]);
      unsigned end = first + 1;
      while (end < device.thread_count && doing(block.threads[end]) == what) ++end;
      const std::string who = std::to_string(first) + (end - first > 1 ? ".." + std::to_string(end - 1) : "");
      const auto line = std::find_if(lines.begin(), lines.end(), [&](const auto& each) { return each.first == what; });
      if (line == lines.end())
        lines.push_back({what, who});
      else
        line->second += ", " + who;
      first = end;
    }
    if (device.together > 1) out += "\n block " + text(block.index) + ":";
    for (const auto& [what, who] : lines) out += "\n  " + what + ": thread " + who;
  }
  return out;
}

void fail_at(const char* name, Where where, const std::string& what) {
  fail(std::string(name) + " at " + text(where) + ": " + what);
}

void require_sm90(const char* name, Where where) {
  if (device.architecture < 90)
    fail_at(name, where, "needs sm_90, and the device is sm_" + std::to_string(device.architecture));
}

}  // namespace cnnops::simt
