// Chooses the target: the fastest that CPU and operating system support, or what LOSA_KERNELS asks for.
#include <atomic>
#include <cstdio>
#include <cstdlib>

#include "kernels/target.h"

#if defined(LOSA_X86)
#include <cpuid.h>
#elif defined(LOSA_ARM) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace losa {
namespace {

// What this CPU can run, fastest last.
struct List {
  const Target *targets[8];
  size_t count = 0;

  void add(const Target &target, bool runs = true) {
    if (runs) {
      targets[count++] = &target;
    }
  }
  const Target *fastest() const { return targets[count - 1]; }
};

#if defined(LOSA_X86)

// The operating system saves the registers only if these bits of XCR0 are set: AVX state, AVX-512 state.
constexpr uint64_t kAvxState = 0x6, kAvx512State = 0xe6;

uint64_t saved_state() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t{high} << 32 | low;
}

struct Features {
  bool avx2 = false, avxvnni = false, avx512 = false, vnni = false;

#if defined(LOSA_EMULATED)
  static constexpr bool emulated = true;
#else
  static constexpr bool emulated = false;
#endif

  Features() {
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) {
      return;
    }
    const bool osxsave = c & (1u << 27), fma = c & (1u << 12), f16c = c & (1u << 29);
    if (!osxsave || (saved_state() & kAvxState) != kAvxState || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
      return;
    }
    const bool bmi = (b & (1u << 3)) && (b & (1u << 8));
    avx2 = (b & (1u << 5)) && fma && f16c && bmi;
    avxvnni = avx2 && (emulated || has_avxvnni(a));
    const uint32_t f_dq_bw_vl = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;
    avx512 = avx2 && (b & f_dq_bw_vl) == f_dq_bw_vl && (saved_state() & kAvx512State) == kAvx512State;
    avx512 = avx512 || emulated;
    const uint32_t vbmi2_vnni = 1u << 6 | 1u << 11;
    vnni = avx512 && ((c & vbmi2_vnni) == vbmi2_vnni || emulated);
  }

  // VPDPBUSD on registers of AVX2, in leaf 7, subleaf 1, if there is one.
  static bool has_avxvnni(uint32_t last_subleaf) {
    uint32_t a, b, c, d;
    return last_subleaf >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 4));
  }
};

void add_own(List *list) {
  const Features features;
  list->add(kAvx2, features.avx2);
#if defined(LOSA_HAS_AVXVNNI)  // the compiler knows it
  list->add(kAvxVnni, features.avxvnni);
#endif
  list->add(kAvx512, features.avx512);
  list->add(kAvx512Vnni, features.vnni);
}

#elif defined(LOSA_ARM)

bool has_dot_product() {
#if defined(__linux__)
  constexpr unsigned long kAsimdDp = 1ul << 20;
  return (getauxval(AT_HWCAP) & kAsimdDp) != 0;
#else
  return true;  // every ARM machine of Apple has it
#endif
}

void add_own(List *list) { list->add(kNeon, has_dot_product()); }

#else

void add_own(List *) {}

#endif

List find_supported() {
  List list;
  list.add(kScalar);
  add_own(&list);
  return list;
}

const List &supported() {
  static const List list = find_supported();
  return list;
}

struct Choice {
  const Target *target;
  char reason[160];
};

const Target *find(const char *name) {
  const List &list = supported();
  // "avx512" means the best AVX-512 of this CPU; the plain one is "avx512f".
  if (std::strcmp(name, "avx512") == 0) {
    const bool there = std::strncmp(list.fastest()->name, "avx512", 6) == 0;
    return there ? list.fastest() : nullptr;
  }
  for (size_t i = 0; i < list.count; ++i) {
    if (std::strcmp(list.targets[i]->name, name) == 0) {
      return list.targets[i];
    }
  }
  return nullptr;
}

Choice choose() {
  Choice choice = {};
  const char *asked = std::getenv("LOSA_KERNELS");
  if (asked != nullptr && *asked != '\0') {
    choice.target = find(asked);
    std::snprintf(
        choice.reason, sizeof choice.reason,
        choice.target ? "LOSA_KERNELS=%.40s" : "LOSA_KERNELS=%.40s, which this CPU or build cannot run",
        asked);
    return choice;
  }
  choice.target = supported().fastest();
  std::snprintf(choice.reason, sizeof choice.reason, "the fastest this CPU supports");
  return choice;
}

const Choice &first_choice() {
  static const Choice choice = choose();
  return choice;
}

std::atomic<const Target *> forced{nullptr};

}  // namespace

const Target *current_target() {
  const Target *target = forced.load(std::memory_order_relaxed);
  return target != nullptr ? target : first_choice().target;
}

}  // namespace losa

using namespace losa;

extern "C" const char *losa_target_name(void) {
  const Target *target = current_target();
  return target == nullptr ? "none" : target->name;
}

extern "C" const char *losa_target_reason(void) {
  return forced.load() != nullptr ? "chosen by the program" : first_choice().reason;
}

extern "C" int losa_target_set(const char *name) {
  const Target *target = name == nullptr ? nullptr : find(name);
  if (name != nullptr && target == nullptr) {
    return LOSA_BAD_TARGET;
  }
  forced.store(target);
  return LOSA_OK;
}

extern "C" const char *losa_target_available(size_t index) {
  const List &list = supported();
  return index < list.count ? list.targets[index]->name : nullptr;
}
