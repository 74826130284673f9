// Devices of ggml's that can run layers in the CPU's place. Their back ends are libraries beside the program
// (libggml-cuda.so and the like, which `scripts/setup --gpu` builds), so that the same program runs on
// machines without.
#pragma once

#include <ggml-backend.h>

#include <cstdint>
#include <string>
#include <vector>

#include "moend/base/error.h"

namespace moend {

struct Device {
  std::string name;         // as llama.cpp's --device has it: "CUDA0"
  std::string description;  // "NVIDIA H200"
  bool gpu = false;
  int64_t free_bytes = 0, total_bytes = 0;
  ggml_backend_dev_t handle = nullptr;  // ggml's, for ever
};

// All that ggml has here, the CPU last. The first call loads the back ends; one that does not load, say for
// want of a driver, counts as missing.
std::vector<Device> ListDevices();

// The one of this name, the first GPU where `name` is empty; null where there is no GPU or the name is
// "none". kNotFound names those that there are.
Expected<ggml_backend_dev_t> FindDevice(const std::string& name);

}  // namespace moend
