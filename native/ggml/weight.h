// One weight in our buffer type: handed over in a type of ggml, held in the form that takes the fewest bytes.
#ifndef LOSA_GGML_WEIGHT_H
#define LOSA_GGML_WEIGHT_H

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "losa/kernels.h"
#include "mapping.h"

namespace losa::ggml {

struct Tensor;

// Bytes of one row of a supported type; 0 if the type is not supported or the columns do not fit it.
size_t row_bytes(int type, uint64_t columns);

class Weight {
 public:
  enum class Form {
    kStock,    // the bytes as handed over, or zero
    kPacked,   // made here: sparse or dense, in our layouts
    kBlob,     // handed over packed
    kDamaged,  // handed over as a blob that is none
  };

  // `place` is where the buffer keeps its stock bytes: zeroed memory that costs nothing until touched.
  Weight(const Tensor &tensor, uint8_t *place);

  // Store bytes as ggml hands them over. Once the whole tensor is there it is packed.
  void set(const void *data, size_t offset, size_t bytes);
  // The bytes that were handed over; where values are zero, their sign or the scale of their block may
  // differ.
  void get(void *data, size_t offset, size_t bytes) const;
  void fill(uint8_t value, size_t offset, size_t bytes);

  Form form() const { return form_; }
  int type() const { return type_; }
  uint32_t rows() const { return rows_; }
  uint32_t columns() const { return columns_; }
  const uint8_t *stock() const { return place_; }
  const losa_tensor &tensor() const { return tensor_; }  // of the packed forms

 private:
  void take(const uint8_t *data);
  bool take_blob(const uint8_t *data);
  bool pack(const uint8_t *data);
  void to_stock();
  void keep_stock(const uint8_t *data);
  void release(size_t used);
  uint8_t *memory(size_t bytes);
  void open(const losa_parts &parts, size_t bytes, Form form);
  void read_row(uint32_t row, uint8_t *stock, std::vector<uint8_t> &codes) const;

  int type_;
  uint32_t rows_, columns_;
  size_t bytes_;
  uint8_t *place_;
  std::string name_;
  size_t received_ = 0;  // bytes handed over in order so far
  Form form_ = Form::kStock;
  OwnedBlob blob_;                // of a packed file
  std::shared_ptr<uint8_t> own_;  // what was packed here: in huge pages, or without room at its place
  std::vector<uint64_t> starts_;
  losa_tensor tensor_ = {};
};

struct Counts {
  uint64_t tensors, packed, dense, dense_bytes, packed_bytes, pack_nanoseconds;
};
Counts counts();
// With LOSA_GGML_VERBOSE: the counts on stderr, once after weights were taken. Nobody says when a model is
// complete, so the first product asks.
void report_load();
// What was wrong with the first damaged weight since the last call; empty if nothing was.
std::string take_damage();

}  // namespace losa::ggml

#endif
