// Every bound that a request can run into, with its default. The flags of `moend serve` have the same names.
#pragma once

#include <cstdint>

namespace moend::serve {

struct Limits {
  // Connections. Reading includes the wait for the first byte of a new connection.
  int64_t connections = 512;                      // beyond it the longest-reading one is closed, else 503
  int64_t header_bytes = 16384;                   // request line and headers together; 431
  int64_t header_count = 100;                     // 431
  int64_t body_bytes = int64_t{4} << 20;          // 413
  int64_t total_body_bytes = int64_t{128} << 20;  // bodies being read, all connections together; 503
  double header_seconds = 10;                     // to send the whole head; 408
  double body_seconds = 60;                       // to send the whole body; 408
  double idle_seconds = 60;                       // between two requests of a connection
  double write_seconds = 30;                      // without progress while we send; the connection is closed
  int64_t requests_per_connection = 1000;
  int64_t stack_bytes = int64_t{2} << 20;  // of a connection's thread; no flag

  // Bodies.
  int64_t json_depth = 32;
  int64_t json_values = 262144;
  int64_t json_fields = 1100;  // of an object, which are looked for one after the other
  int64_t messages = 1024;
  int64_t stops = 16;
  int64_t stop_bytes = 256;  // each
  int64_t logit_bias = 1024;
  int64_t tools = 128;
  int64_t top_logprobs = 20;

  // Work.
  int64_t prompt_tokens = 0;          // 0: the context less one
  int64_t max_tokens = 0;             // most a request may ask for; 0: the context
  int64_t default_max_tokens = 2048;  // when a request does not say
  int64_t queue = 512;                // waiting requests, all keys together; 429
  int64_t queue_per_key = 256;        // 429
  double queue_seconds = 600;         // a request that waited longer gets 503
};

}  // namespace moend::serve
