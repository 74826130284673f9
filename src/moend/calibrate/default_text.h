// The mixed text that calibration measures on when no other is given: prose, code, tables, dialogue, records,
// labels from examples, other languages, each followed by what needs the context
// (models/calibration-mixed.txt, made by scripts/calibration-text.mjs). It is a part of the library.
#pragma once

#include <string>
#include <string_view>

#include "moend/base/error.h"
#include "moend/model/model.h"

namespace moend {

// The file as it is, with its marks.
std::string_view MixedText();

// Its conversations in the model's chat template, or, for a model without one, as "User: ..." and
// "Assistant: ...". Special tokens of the template are spelled out: tokenize with parse_special.
Expected<std::string> DefaultCalibrationText(const Tokenizer& tokenizer);

// The same of another text with such marks: a line "%%% text" begins plain text, "%%% user" and
// "%%% assistant" a turn of a conversation. What stands before the first mark is plain text. kCorrupt for
// another mark.
Expected<std::string> RenderMarkedText(std::string_view text, const Tokenizer& tokenizer);

}  // namespace moend
