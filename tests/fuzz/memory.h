// Memory that operator new has handed out to this thread's program, counted where no sanitizer does.
#pragma once

#include <cstdint>

namespace moend::fuzz {

int64_t StartCounting();  // bytes in use now, from which the most is counted anew
int64_t MostCounted();    // the most bytes in use since

}  // namespace moend::fuzz
