#include "moend/serve/page/page.h"

namespace moend::serve {

const std::string& PageHtml() {
  static const std::string html =
#include "moend_page.inc"
      ;
  return html;
}

}  // namespace moend::serve
