// The two ways into ggml, and what they share: our buffer type.
#ifndef LOSA_GGML_ROUTES_H
#define LOSA_GGML_ROUTES_H

#include <string>

#include "symbols.h"
#include "weight.h"

namespace losa::ggml {

// ggml in this process; filled once before a route is installed.
extern Symbols ggml;

// Whether weights that are loaded from now on are taken.
void set_accept(bool on);

// A buffer type whose weights are held in our forms. One for the process.
BufferType *weight_buffers(Device *device, void *context);
bool is_ours(const BufferType *type);
// The weight of a node that we compute; null if the node is none of ours.
const Weight *weight_of(const Tensor *op);
// MUL_MAT by a weight of ours, or by one that we would take: asked before any weight is loaded.
bool can_compute(const Tensor *op);

// Route a: our buffer type among the extra ones of the CPU backend. Empty, or why that cannot be.
std::string install_extra_buffer_type();

// Route b: an accelerator device. Its registry is to be registered by the caller.
Registry *accelerator();

// A registry without devices, for hosts that load us although there is nothing to register.
Registry *empty_registry();

}  // namespace losa::ggml

#endif
