// How the values of a model's header are called outside the library.
#pragma once

#include "error.h"
#include "model.h"

namespace bertrt {

const char* precision_name(Precision precision);     // "fp32", "bf16", "int8"
const char* activation_name(Activation activation);  // "gelu", "gelu_new", "relu"
const char* error_name(ErrorCode code);              // "invalid_argument", "not_found" and so on

}  // namespace bertrt
