#include "symbols.h"

#include <dlfcn.h>

#include <cstring>
#include <string>
#include <vector>
#ifdef __APPLE__
#include <mach-o/dyld.h>
#else
#include <link.h>
#endif

namespace losa::ggml {
namespace {

const char *const kTestedVersions[] = {"0.25.1", "0.25.3"};

std::string tested() {
  std::string list;
  for (const char *version : kTestedVersions) {
    list += std::string(list.empty() ? "" : ", ") + version;
  }
  return list;
}

std::vector<std::string> loaded_libraries() {
  std::vector<std::string> paths;
#ifdef __APPLE__
  for (uint32_t i = 0; i < _dyld_image_count(); ++i) {
    paths.emplace_back(_dyld_get_image_name(i));
  }
#else
  dl_iterate_phdr(
      [](dl_phdr_info *info, size_t, void *list) {
        static_cast<std::vector<std::string> *>(list)->emplace_back(info->dlpi_name);
        return 0;
      },
      &paths);
#endif
  return paths;
}

// Handles of loaded libraries whose file name starts like this. They stay open.
void add_loaded(const char *prefix, std::vector<void *> *handles) {
  for (const std::string &path : loaded_libraries()) {
    const std::string file = path.substr(path.rfind('/') + 1);
    if (file.compare(0, std::strlen(prefix), prefix) == 0) {
      if (void *handle = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD)) {
        handles->push_back(handle);
      }
    }
  }
}

void *library_of(const void *address) {
  Dl_info info = {};
  return address != nullptr && dladdr(address, &info) != 0 && info.dli_fname != nullptr
             ? dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD)
             : nullptr;
}

// The ggml that runs the models: a lookup through libllama finds the copy that it depends on.
void *find_library(void *handle, const void *near) {
  std::vector<void *> candidates = {handle, library_of(near)};
  add_loaded("libllama", &candidates);
  add_loaded("libggml", &candidates);
  candidates.push_back(RTLD_DEFAULT);
  for (size_t i = 0; i < candidates.size(); ++i) {
    const bool last = i + 1 == candidates.size();
    if ((candidates[i] != nullptr || last) && dlsym(candidates[i], "ggml_backend_dev_by_type") &&
        dlsym(candidates[i], "ggml_version")) {
      return candidates[i];
    }
  }
  return nullptr;
}

template <typename Function>
bool find(void *library, const char *name, Function *function) {
  *function = reinterpret_cast<Function>(dlsym(library, name));
  return *function != nullptr;
}

// The structures as this ggml fills them. Every one was checked by hand in the tested versions; this finds
// a build of such a version that was changed.
bool structures_match(void *library, const Symbols &s) {
  struct Parameters {
    size_t bytes;
    void *memory;
    bool no_data;
  };
  void *(*init)(Parameters) = nullptr;
  void (*free)(void *) = nullptr;
  Tensor *(*new_tensor)(void *, int, int64_t, int64_t) = nullptr;
  Tensor *(*set_name)(Tensor *, const char *) = nullptr;
  size_t (*overhead)() = nullptr;
  if (!find(library, "ggml_init", &init) || !find(library, "ggml_free", &free) ||
      !find(library, "ggml_new_tensor_2d", &new_tensor) || !find(library, "ggml_set_name", &set_name) ||
      !find(library, "ggml_tensor_overhead", &overhead)) {
    return false;
  }
  void *context = init({4 * overhead(), nullptr, true});
  if (context == nullptr) {
    return false;
  }
  const Tensor *t = set_name(new_tensor(context, kQ8_0, 64, 3), "losa");
  const bool tensor = overhead() == sizeof(Tensor) + 32 && t->type == kQ8_0 && t->ne[0] == 64 &&
                      t->ne[1] == 3 && t->ne[3] == 1 && t->nb[0] == 34 && t->nb[1] == 68 &&
                      t->extra == nullptr && std::strcmp(t->name, "losa") == 0;
  free(context);
  BufferType *type = s.cpu_buffer_type();
  const char *name = type->calls.name(type);
  return tensor && std::strncmp(name, "CPU", 3) == 0 && s.is_host(type) && s.cpu->calls.type(s.cpu) == kCpu &&
         s.cpu->calls.supports_buffer(s.cpu, type) && s.cpu->registry->version == kRegistryVersion;
}

int find_mul_mat(void *library) {
  const char *(*name)(int) = nullptr;
  if (find(library, "ggml_op_name", &name)) {
    for (int op = 0; op < 64; ++op) {
      if (std::strcmp(name(op), "MUL_MAT") == 0) {
        return op;
      }
    }
  }
  return -1;
}

}  // namespace

std::string find_symbols(void *handle, const void *near, Symbols *symbols) {
  void *library = find_library(handle, near);
  if (library == nullptr) {
    return "no ggml is loaded in this process (import llama_cpp first)";
  }
  Symbols s = {};
  if (!find(library, "ggml_version", &s.version) || !find(library, "ggml_commit", &s.commit)) {
    return "this ggml does not tell its version; tested are " + tested();
  }
  s.text = std::string("ggml ") + s.version() + " (" + s.commit() + ")";
  bool known = false;
  for (const char *version : kTestedVersions) {
    known = known || std::strcmp(version, s.version()) == 0;
  }
  if (!known) {
    return s.text + " is not a version the sparse backend was tested with (" + tested() + ")";
  }
  if (!find(library, "ggml_backend_dev_by_type", &s.device_by_type) ||
      !find(library, "ggml_backend_cpu_buffer_type", &s.cpu_buffer_type) ||
      !find(library, "ggml_backend_buft_is_host", &s.is_host) ||
      !find(library, "ggml_backend_buffer_init", &s.buffer_init) ||
      !find(library, "ggml_backend_register", &s.register_registry) ||
      !find(library, "ggml_graph_n_nodes", &s.graph_nodes) ||
      !find(library, "ggml_graph_node", &s.graph_node)) {
    return s.text + " lacks a function that the sparse backend needs";
  }
  s.cpu = s.device_by_type(kCpu);
  if (s.cpu == nullptr) {
    return s.text + " has no CPU backend loaded";
  }
  s.mul_mat = find_mul_mat(library);
  if (s.mul_mat < 0 || !structures_match(library, s)) {
    return s.text + " has other structures than the release of that version";
  }
  // The CPU backend may be a library of its own that nothing links to: it is found by one of its functions.
  void *threads = s.cpu->registry->calls.function(s.cpu->registry, "ggml_backend_set_n_threads");
  void *cpu = library_of(threads);
  if (cpu == nullptr || !find(cpu, "ggml_get_type_traits_cpu", &s.cpu_type_traits)) {
    return s.text + " has a CPU backend that exports nothing";
  }
  find(cpu, "ggml_barrier", &s.barrier);
  s.extra_buffer_types =
      reinterpret_cast<ExtraBufferTypes>(dlsym(cpu, "_Z39ggml_backend_cpu_get_extra_buffer_typesv"));
  s.extra_types_of = reinterpret_cast<BufferType **(*)(Device *)>(
      s.cpu->registry->calls.function(s.cpu->registry, "ggml_backend_dev_get_extra_bufts"));
  *symbols = s;
  return "";
}

}  // namespace losa::ggml
