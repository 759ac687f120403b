// A class as a value: what a function that chooses among classes gives to a generic lambda.
#ifndef LOSA_TAG_H
#define LOSA_TAG_H

namespace losa {
namespace {

template <typename T>
struct Tag {
  using Type = T;
};

}  // namespace
}  // namespace losa

#endif
