// Final answers to mathematical problems: finding them in a worked solution, and telling whether two formulas
// are the same. The normalisation follows what the MATH data set's authors check (Hendrycks et al. 2021);
// beyond it, formulas that differ as text are compared by their values.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace moend::eval {

// The content of the last \boxed{}, \fbox{} or \framebox{}; else what follows the last "answer is" or "####"
// on its line; else the last number. Empty when there is none.
std::string ExtractMathAnswer(std::string_view text);

// The last number in the text, with its sign and without thousands separators ("1,234.50" is "1234.50").
std::string LastNumber(std::string_view text);

// Equal as decimal numbers, however written: "007.50" is "7.5", "-0" is "0".
bool SameNumber(std::string_view a, std::string_view b);

// The value of an integer, "025" being 25; empty for anything else, 3.5 among them.
std::optional<int64_t> IntegerValue(std::string_view text);

// The same formula in one spelling, without spaces, units, text and layout commands.
std::string NormalizeMath(std::string_view formula);

// The same answer. Tuples and intervals compare in order, bare lists and sets in any order.
bool SameMath(std::string_view a, std::string_view b);

// The value of a LaTeX expression in which every letter stands for some fixed number picked by `seed`;
// nothing for what is no such expression. Two expressions with equal values under several seeds are equal.
std::optional<double> EvaluateMath(std::string_view normalized, uint64_t seed);

}  // namespace moend::eval
