// What a server does with sessions beside computing: pack an idle one smaller, and move one to another
// process.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "moend/engine/engine.h"

namespace moend {

// While generating, scorers that observe queries look at this many of the newest tokens: their queries must
// be kept for every layer, so a long window would cost more memory than the tokens it judges.
inline constexpr int64_t kDecodeObserved = 16;

// Re-packs every layer for `plan`, which should want no more bits and tokens of a layer than the session's
// own: what is gone does not come back. Eviction to the new ratios takes place at once. kMismatch for a plan
// of another model or other protected tokens. After an error the session cannot be used further.
Expected<void> RecompressSession(Session& session, const Plan& plan);

// The tokens and the caches of a session as bytes, checked by the caller for being intact; logits and the
// scorer's queries are not among them, so a restored session must read at least one more token before
// logits() mean something. A session that is not usable() is not saved.
Expected<std::string> SaveSession(const Session& session);

// `plan` is the one that the saved session had. kCorrupt or kMismatch for bytes that are not of this model
// and plan, or that hold more tokens than it allows.
Expected<Session> RestoreSession(std::shared_ptr<Engine> engine, const Plan& plan,
                                 const SessionOptions& options, std::string_view bytes);

}  // namespace moend
