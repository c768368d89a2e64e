#include "tca-rpc.h"

#include "ggml-impl.h"

#include <cstring>
#include <map>
#include <mutex>

#if !defined(_WIN32)
#    include <netinet/in.h>
#    include <netinet/tcp.h>
#    include <sys/socket.h>
#endif

static const char * signature() {
    return "tca " TCA_PACKAGE_VERSION " " TCA_PATCH_HASH;
}

namespace {

constexpr uint8_t GREETING = 0x74;  // "t"

struct peer {
    bool ours        = false;
    bool other_build = false;
    bool lost        = false;
    std::map<std::string, bool> runs;  // by device, kind and shape of a node
};

struct peers_t {
    std::mutex mutex;
    std::map<std::string, peer> all;  // by endpoint
};

} // namespace

static peers_t & peers() {
    static peers_t * p = new peers_t;  // never destroyed: connections are closed after static objects are
    return *p;
}

static thread_local uint8_t heard = 0;

uint8_t tca_rpc_greeting() {
    return GREETING;
}

void tca_rpc_sign(char * name, size_t size) {
    memset(name, 0, size);
    strncpy(name, signature(), size - 1);
}

uint64_t tca_rpc_answer(ggml_backend_t backend, ggml_tensor * node, bool in_place) {
    char expected[GGML_MAX_NAME];
    tca_rpc_sign(expected, sizeof(expected));
    if (strncmp(node->name, expected, sizeof(expected)) != 0) {
        return 2;
    }
    node->view_src = in_place ? node->src[0] : nullptr;
    return ggml_backend_supports_op(backend, node);
}

void tca_rpc_heard(uint8_t greeting) {
    heard = greeting;
}

void tca_rpc_connected(const std::string & endpoint) {
    const std::lock_guard<std::mutex> lock(peers().mutex);
    peers().all[endpoint] = peer();  // another server may be there now
    peers().all[endpoint].ours = heard == GREETING;
}

bool tca_rpc_supports(const std::string & endpoint, uint32_t device, const ggml_tensor * node, const std::function<uint64_t()> & ask) {
    tca_op_params params = tca_op_get_params(node);
    params.row   = 0;
    params.scale = params.softcap = 0.0f;
    params.select.layer = 0;
    std::string key((const char *) &params, sizeof(params));
    key.append((const char *) &device, sizeof(device));
    for (const ggml_tensor * src : node->src) {
        const int64_t shape[] = { src != nullptr, src ? src->type : 0, src ? src->ne[0] : 0, src ? src->ne[1] : 0 };
        key.append((const char *) shape, sizeof(shape));
    }
    {
        const std::lock_guard<std::mutex> lock(peers().mutex);
        const peer & p  = peers().all[endpoint];
        const auto   it = p.runs.find(key);
        if (!p.ours || it != p.runs.end()) {
            return p.ours && it->second;
        }
    }
    const uint64_t answer = ask();
    const std::lock_guard<std::mutex> lock(peers().mutex);
    peer & p = peers().all[endpoint];
    if (!p.lost) {
        p.other_build = p.other_build || answer > 1;
        p.runs[key]   = answer == 1;
    }
    return answer == 1;
}

bool tca_rpc_survive(const std::string & endpoint, bool status, void * output, size_t size) {
    if (!status) {
        if (output) {
            memset(output, 0, size);
        }
        const std::lock_guard<std::mutex> lock(peers().mutex);
        peer & p = peers().all[endpoint];
        if (!p.lost) {
            GGML_LOG_ERROR("tca: the RPC server at %s is gone; what was computed there is lost, and so is its part of the cache. "
                    "Load the model again once it is back\n", endpoint.c_str());
        }
        p.lost = true;
    }
    return true;
}

bool tca_rpc_lost(const std::string & endpoint, void * output, size_t size) {
    const std::lock_guard<std::mutex> lock(peers().mutex);
    const bool lost = peers().all[endpoint].lost;
    if (lost && output) {
        memset(output, 0, size);
    }
    return lost;
}

void tca_rpc_keepalive(int socket) {
#if defined(__linux__)
    const int on = 1, idle = 5, interval = 2, count = 3, timeout_ms = 10000;
    setsockopt(socket, SOL_SOCKET,  SO_KEEPALIVE,     &on,         sizeof(on));
    setsockopt(socket, IPPROTO_TCP, TCP_KEEPIDLE,     &idle,       sizeof(idle));
    setsockopt(socket, IPPROTO_TCP, TCP_KEEPINTVL,    &interval,   sizeof(interval));
    setsockopt(socket, IPPROTO_TCP, TCP_KEEPCNT,      &count,      sizeof(count));
    setsockopt(socket, IPPROTO_TCP, TCP_USER_TIMEOUT, &timeout_ms, sizeof(timeout_ms));
#else
    GGML_UNUSED(socket);
#endif
}

static tca_rpc_status status_of(const char * endpoint) {
    const std::lock_guard<std::mutex> lock(peers().mutex);
    const peer & p = peers().all[endpoint];
    return p.lost ? TCA_RPC_LOST : !p.ours ? TCA_RPC_FOREIGN : p.other_build ? TCA_RPC_OTHER_BUILD : TCA_RPC_SAME_BUILD;
}

void * tca_rpc_proc_address(const char * name) {
    return strcmp(name, "tca_rpc_status") == 0 ? (void *) status_of : nullptr;
}
