#include "moend/model/big_stack.h"

#include <pthread.h>

namespace moend {

Expected<void> RunWithStack(int64_t bytes, const std::function<void()>& work) {
  pthread_attr_t attributes;
  pthread_t thread;
  bool started = false;
  if (pthread_attr_init(&attributes) == 0) {
    started = pthread_attr_setstacksize(&attributes, static_cast<std::size_t>(bytes)) == 0 &&
              pthread_create(
                  &thread, &attributes,
                  [](void* work) -> void* {
                    (*static_cast<const std::function<void()>*>(work))();
                    return nullptr;
                  },
                  const_cast<std::function<void()>*>(&work)) == 0;
    pthread_attr_destroy(&attributes);
  }
  if (!started)
    return Fail(ErrorCode::kOutOfMemory, "the system refused a thread with a stack of {} bytes", bytes);
  pthread_join(thread, nullptr);
  return {};
}

}  // namespace moend
