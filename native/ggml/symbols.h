// ggml as it is loaded in this process: found at run time, because the plug-in links to none.
#ifndef LOSA_GGML_SYMBOLS_H
#define LOSA_GGML_SYMBOLS_H

#include <string>

#include "abi.h"

namespace losa::ggml {

struct Symbols {
  const char *(*version)();
  const char *(*commit)();
  Device *(*device_by_type)(int type);
  BufferType *(*cpu_buffer_type)();
  bool (*is_host)(BufferType *);
  Buffer *(*buffer_init)(BufferType *, BufferCalls, void *context, size_t bytes);
  void (*register_registry)(Registry *);
  int (*graph_nodes)(Graph *);
  Tensor *(*graph_node)(Graph *, int index);
  // Of the CPU backend; the last two are null where it does not export them.
  const CpuTypeTraits *(*cpu_type_traits)(int type);
  void (*barrier)(ThreadPool *);
  ExtraBufferTypes extra_buffer_types;
  BufferType **(*extra_types_of)(Device *);  // what models are loaded with: made once; may be null
  Device *cpu;
  int mul_mat;       // number of the operation in this version
  std::string text;  // "ggml 0.25.3 (0c1e570)"
};

// Fills `symbols`, or says why not. `near`: a library handle, or an address inside a library, of the ggml
// that is meant where a process holds several; both may be null.
std::string find_symbols(void *handle, const void *near, Symbols *symbols);

}  // namespace losa::ggml

#endif
