// A state in memory, written and read back: what a stock memory held before a restore that may fail.
#pragma once

#include "llama-io.h"

#include "ggml-backend.h"

#include <cstring>
#include <stdexcept>
#include <vector>

class tca_io_copy : public llama_io_write_i, public llama_io_read_i {
public:
    void write(const void * src, size_t size) override {
        data.insert(data.end(), (const uint8_t *) src, (const uint8_t *) src + size);
    }
    void write_tensor(ggml_tensor * tensor, size_t offset, size_t size) override {
        data.resize(data.size() + size);
        ggml_backend_tensor_get(tensor, data.data() + data.size() - size, offset, size);
    }
    void read(void * dst, size_t size) override {
        memcpy(dst, take(size), size);
    }
    void read_tensor(ggml_tensor * tensor, size_t offset, size_t size) override {
        ggml_backend_tensor_set(tensor, take(size), offset, size);
    }
    size_t n_bytes() override { return n_read > 0 ? n_read : data.size(); }

private:
    std::vector<uint8_t> data;
    size_t               n_read = 0;

    const uint8_t * take(size_t size) {
        if (size > data.size() - n_read) {
            throw std::runtime_error("unexpectedly reached end of buffer");
        }
        n_read += size;
        return data.data() + n_read - size;
    }
};
