// Which ISA level runs: the best that this processor has, or a lower one that CNNOPS_CPU_ISA names.
#include <cstdio>
#include <cstdlib>
#include <string>
#include <string_view>

#include "kernels.h"

#ifndef CNNOPS_FLAGS
#define CNNOPS_FLAGS ""
#endif

namespace cnnops {
namespace cpu {
namespace baseline {
extern const Kernels table;
}
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}

namespace {

struct Level {
  const char* name;
  const Kernels* table;
  bool usable;
};

const Level& choose() {
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  static const Level levels[] = {
      {"avx512", &avx512::table, avx512}, {"avx2", &avx2::table, avx2}, {"baseline", &baseline::table, true}};
  const Level* best = levels;
  while (!best->usable) ++best;

  const char* wanted = std::getenv("CNNOPS_CPU_ISA");
  if (!wanted || !*wanted) return *best;
  for (const Level& level : levels)
    if (level.usable && std::string_view(level.name) == wanted) return level;
  std::fprintf(stderr, "cnnops: CNNOPS_CPU_ISA=%s is not one of the levels that this processor has:", wanted);
  for (const Level& level : levels)
    if (level.usable) std::fprintf(stderr, " %s", level.name);
  std::fprintf(stderr, "; using %s\n", best->name);
  return *best;
}

const Level& level() {
  static const Level& chosen = choose();
  return chosen;
}

std::string quoted(std::string_view text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    out += c;
  }
  return out + '"';
}

}  // namespace
}  // namespace cpu

const Kernels& kernels() { return *cpu::level().table; }

const char* build_info() {
#define CNNOPS_NAME(name) ", \"" #name "\""
  static const std::string info =
      std::string(R"({"backend": "cpu", "compiler": )") + cpu::quoted("g++ " __VERSION__) + R"(, "flags": )" +
      cpu::quoted(CNNOPS_FLAGS) + R"(, "isa_levels": ["baseline", "avx2", "avx512"], "isa": )" +
      cpu::quoted(cpu::level().name) + R"(, "kernels": [)" + (CNNOPS_KERNELS(CNNOPS_NAME) + 2) + "]}";
#undef CNNOPS_NAME
  return info.c_str();
}

}  // namespace cnnops
