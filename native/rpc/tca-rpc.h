// What the patch in ggml-rpc calls: nodes of ours on another machine, and servers that go away.
//
// llama.cpp's RPC backend ships nodes as they are, and takes every node on behalf of a server that it knows nothing of. A server of
// ours says so in a byte of its greeting that others leave 0; only such a server is ever sent a node of ours. Whether it runs one
// is asked with RPC_CMD_GET_ALLOC_SIZE, with the build's signature as the node's name: nodes mean the same in the same build alone.
#pragma once

#include "ops/tca-ops.h"

#include "ggml-backend.h"

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

// ---- server

uint8_t tca_rpc_greeting();

// Answer to a question about a node: 1 the backend runs it, 0 it does not, 2 the question comes from another build. in_place: the
// node is a view of its first source, which the question does not carry.
uint64_t tca_rpc_answer(ggml_backend_t backend, ggml_tensor * node, bool in_place);

// ---- client

// The connecting thread heard a greeting; then it knows for which endpoint.
void tca_rpc_heard(uint8_t greeting);
void tca_rpc_connected(const std::string & endpoint);

void tca_rpc_sign(char * name, size_t size);

// Whether the server runs the node; ask() sends the question, and is called at most once for nodes of one kind and shape.
bool tca_rpc_supports(const std::string & endpoint, uint32_t device, const ggml_tensor * node, const std::function<uint64_t()> & ask);

// Instead of ending the process when a server is gone: the first failure is logged, what was to be received is zeroed, and from then
// on every command is skipped and every graph fails. true.
bool tca_rpc_survive(const std::string & endpoint, bool status, void * output, size_t size);

// Whether the server was lost; zeroes what was to be received then.
bool tca_rpc_lost(const std::string & endpoint, void * output, size_t size);

// Seconds, not hours, until the silence of a machine that was switched off counts as its loss.
void tca_rpc_keepalive(int socket);

// Functions for get_proc_address: "tca_rpc_status" is a tca_rpc_status_fn. NULL for any other name.
void * tca_rpc_proc_address(const char * name);

enum tca_rpc_status {
    TCA_RPC_FOREIGN,      // not a server of tca-gguf, or not connected yet
    TCA_RPC_OTHER_BUILD,
    TCA_RPC_SAME_BUILD,
    TCA_RPC_LOST,
};

// endpoint: the device's description, "host:port".
typedef enum tca_rpc_status (*tca_rpc_status_fn)(const char * endpoint);
