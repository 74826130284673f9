#include "moend/model/device.h"

#include <dlfcn.h>
#include <ggml-cpu.h>

#include <algorithm>
#include <array>
#include <filesystem>
#include <mutex>
#include <system_error>

#include "moend/model/tokenizer.h"

namespace moend {
namespace {

namespace fs = std::filesystem;

// Beside the program, where `make install` puts it, and where scripts/setup builds it.
std::vector<fs::path> Folders() {
  std::vector<fs::path> folders;
  std::error_code error;
  const fs::path program = fs::read_symlink("/proc/self/exe", error);
  if (!error) {
    folders.push_back(program.parent_path());
    folders.push_back(program.parent_path().parent_path() / MOEND_INSTALLED_BACKENDS);
  }
#ifdef MOEND_BACKEND_DIR
  folders.emplace_back(MOEND_BACKEND_DIR);
#endif
  return folders;
}

// A back end has its own copy of ggml's base, which would print on its own.
void Silence(const fs::path& library) {
  void* const handle = ::dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!handle) return;  // ggml will find the same
  using LogSet = void (*)(ggml_log_callback, void*);
  if (const auto set = reinterpret_cast<LogSet>(::dlsym(handle, "ggml_log_set")))
    set([](ggml_log_level, const char*, void*) {}, nullptr);
  // ggml opens it once more, and it stays.
}

void LoadBackEnds() {
  static std::once_flag loaded;
  std::call_once(loaded, [] {
    StartLibllama();  // before ggml says what it loads
    for (const char* kind : {"cuda", "hip", "vulkan", "sycl"}) {
      for (const fs::path& folder : Folders()) {
        const fs::path library = folder / (std::string("libggml-") + kind + ".so");
        std::error_code error;
        if (!fs::exists(library, error)) continue;
        Silence(library);
        if (ggml_backend_load(library.c_str())) break;
      }
    }
  });
}

}  // namespace

std::vector<Device> ListDevices() {
  LoadBackEnds();
  std::vector<Device> devices;
  for (std::size_t i = 0; i < ggml_backend_dev_count(); ++i) {
    const ggml_backend_dev_t handle = ggml_backend_dev_get(i);
    const auto type = ggml_backend_dev_type(handle);
    const bool gpu = type == GGML_BACKEND_DEVICE_TYPE_GPU || type == GGML_BACKEND_DEVICE_TYPE_IGPU;
    if (!gpu && type != GGML_BACKEND_DEVICE_TYPE_CPU) continue;
    std::size_t free = 0, total = 0;
    ggml_backend_dev_memory(handle, &free, &total);
    devices.push_back({ggml_backend_dev_name(handle), ggml_backend_dev_description(handle), gpu,
                       static_cast<int64_t>(free), static_cast<int64_t>(total), handle});
  }
  std::ranges::stable_partition(devices, &Device::gpu);
  return devices;
}

Expected<ggml_backend_dev_t> FindDevice(const std::string& name) {
  if (name == "none") return nullptr;
  const std::vector<Device> devices = ListDevices();
  std::string names;
  for (const Device& d : devices) {
    if (name.empty() ? d.gpu : d.name == name) return d.handle;
    names += (names.empty() ? "" : ", ") + d.name;
  }
  if (name.empty()) return nullptr;
  return Fail(ErrorCode::kNotFound, "there is no device {} here; there are {}, and none", name, names);
}

}  // namespace moend
