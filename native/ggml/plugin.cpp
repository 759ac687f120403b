#include "plugin.h"

#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>

#include "routes.h"

namespace losa::ggml {
namespace {

std::recursive_mutex guard;
void *library = nullptr;
std::string status = "not started";
const char *route = "off";
bool started = false;
Registry *registry = nullptr;  // of route b

// Our code must stay: ggml keeps pointers to it even if it closes the library.
void stay_loaded() {
  Dl_info info = {};
  if (dladdr(reinterpret_cast<void *>(&stay_loaded), &info) != 0) {
    dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD | RTLD_NODELETE);
  }
}

// Empty if a route is ready or none is wanted, else why not.
std::string install(const void *near) {
  const char *variable = std::getenv("LOSA_GGML");
  const std::string wanted = variable == nullptr ? "" : variable;
  if (wanted == "off") {
    status = "off (LOSA_GGML=off)";
    return "";
  }
  if (!wanted.empty() && wanted != "a" && wanted != "b") {
    return "LOSA_GGML is " + wanted + "; it takes a, b or off";
  }
  if (std::strcmp(losa_target_name(), "none") == 0) {
    return std::string("there are no such kernels here: ") + losa_target_reason();
  }
  const std::string reason = find_symbols(library, near, &ggml);
  if (!reason.empty()) {
    return reason;
  }
  const std::string obstacle = wanted == "b" ? "is not to take route a" : install_extra_buffer_type();
  if (obstacle.empty()) {
    route = "a";
    status = "route a (extra buffer type), ";
  } else if (wanted == "a") {
    return ggml.text + " " + obstacle + "; unset LOSA_GGML, or set it to b";
  } else {
    registry = accelerator();
    route = "b";
    status = "route b (accelerator device), ";
  }
  status += ggml.text + ", kernels " + losa_target_name();
  stay_loaded();
  return "";
}

bool start(const void *near) {
  const std::lock_guard<std::recursive_mutex> lock(guard);
  if (started) {
    return true;
  }
  const std::string reason = install(near);
  started = reason.empty();
  if (!started) {
    status = reason;
  }
  return started;
}

}  // namespace
}  // namespace losa::ggml

using namespace losa::ggml;

extern "C" int ggml_backend_score(void) { return 1; }

extern "C" void *ggml_backend_init(void) {
  const std::lock_guard<std::recursive_mutex> lock(guard);
  const bool before = started;
  if (!start(__builtin_return_address(0))) {
    std::fprintf(stderr, "losa: the sparse backend is not used: %s\n", status.c_str());
    return nullptr;
  }
  if (std::getenv("LOSA_GGML_VERBOSE") != nullptr) {
    std::fprintf(stderr, "losa: %s\n", status.c_str());
  }
  return before || registry == nullptr ? empty_registry() : registry;
}

extern "C" void losa_ggml_library(void *handle) { library = handle; }

extern "C" int losa_ggml_start(void) {
  const std::lock_guard<std::recursive_mutex> lock(guard);
  const bool before = started;
  if (!start(nullptr)) {
    return 1;
  }
  if (!before && registry != nullptr) {
    ggml.register_registry(registry);
  }
  return 0;
}

extern "C" const char *losa_ggml_status(void) { return status.c_str(); }
extern "C" const char *losa_ggml_route(void) { return route; }
extern "C" void losa_ggml_accept(int on) { set_accept(on != 0); }

extern "C" const char *losa_ggml_damage(void) {
  static std::string text;
  text = take_damage();
  return text.c_str();
}

extern "C" void losa_ggml_statistics(losa_ggml_counts *out) {
  const Counts c = counts();
  *out = {c.tensors, c.packed, c.dense, c.dense_bytes, c.packed_bytes, c.pack_nanoseconds};
}
