#include "tca-source.h"

#include "tca-budgets.h"

#include "ggml.h"

#include <sys/stat.h>

#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

static const char * const SUFFIX = ".tca.gguf";
static const char * const KEY    = "tca.model.identity";

#ifdef _WIN32
static const char * const SEPARATORS = "/\\";
#else
static const char * const SEPARATORS = "/";
#endif

static bool is_folder(const std::string & path) {
    struct stat info;
    return stat(path.c_str(), &info) == 0 && (info.st_mode & S_IFMT) == S_IFDIR;
}

static bool is_file(const std::string & path) {
    struct stat info;
    return stat(path.c_str(), &info) == 0 && (info.st_mode & S_IFMT) != S_IFDIR;
}

static bool ends_with(const std::string & text, const std::string & end) {
    return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

// "-00001-of-00003.gguf": length of that ending, and n = 3; 0 for any other
static size_t split_ending(const std::string & path, int & n) {
    const size_t length = strlen("-00001-of-00003.gguf");
    int i = 0, end = 0;
    if (path.size() > length && sscanf(path.c_str() + path.size() - length, "-%5d-of-%5d.gguf%n", &i, &n, &end) == 2 &&
            end == (int) length && n > 0) {
        return length;
    }
    n = 1;
    return 0;
}

static std::string without_ending(const std::string & path) {
    int n;
    if (const size_t length = split_ending(path, n)) {
        return path.substr(0, path.size() - length);
    }
    return ends_with(path, ".gguf") ? path.substr(0, path.size() - 5) : path;
}

std::string tca_beside(const std::string & path) {
    return without_ending(path) + SUFFIX;
}

static std::string file_name(const std::string & path) {
    const size_t at = path.find_last_of(SEPARATORS);
    return at == std::string::npos ? path : path.substr(at + 1);
}

std::string tca_user_folder() {
#ifdef _WIN32
    const char * base = getenv("LOCALAPPDATA");
    return base && *base ? std::string(base) + "\\tca-gguf" : "";
#else
    const char * data = getenv("XDG_DATA_HOME");
    if (data && *data == '/') {
        return std::string(data) + "/tca-gguf";
    }
    const char * home = getenv("HOME");
    return home && *home ? std::string(home) + "/.local/share/tca-gguf" : "";
#endif
}

//
// identity
//

namespace {

// FNV-1a
struct hasher {
    uint64_t value = 0xcbf29ce484222325ull;

    void bytes(const void * data, size_t n) {
        const uint8_t * p = (const uint8_t *) data;
        for (size_t i = 0; i < n; ++i) {
            value = (value ^ p[i])*0x100000001b3ull;
        }
    }
    void number(uint64_t n) {
        for (int i = 0; i < 8; ++i, n >>= 8) {
            const uint8_t byte = n & 0xff;
            bytes(&byte, 1);
        }
    }
    void text(const char * s) {
        const size_t n = strlen(s);
        number(n);
        bytes(s, n);
    }
};

struct tensor {
    std::string name;
    ggml_type   type;
    size_t      size;
    size_t      file;    // which part holds it
    uint64_t    offset;  // in that part
};

void hash_values(hasher & h, const gguf_context * gguf, const std::string & prefix) {
    std::vector<std::pair<std::string, int64_t>> keys;
    for (int64_t i = 0; i < gguf_get_n_kv(gguf); ++i) {
        if (strncmp(gguf_get_key(gguf, i), prefix.c_str(), prefix.size()) == 0) {
            keys.emplace_back(gguf_get_key(gguf, i), i);
        }
    }
    std::sort(keys.begin(), keys.end());
    for (const auto & [key, i] : keys) {
        h.text(key.c_str());
        const gguf_type type = gguf_get_kv_type(gguf, i);
        h.number(type);
        if (type == GGUF_TYPE_STRING) {
            h.text(gguf_get_val_str(gguf, i));
        } else if (type == GGUF_TYPE_ARRAY) {
            const gguf_type item = gguf_get_arr_type(gguf, i);
            const size_t    n    = gguf_get_arr_n(gguf, i);
            h.number(item);
            h.number(n);
            for (size_t j = 0; item == GGUF_TYPE_STRING && j < n; ++j) {
                h.text(gguf_get_arr_str(gguf, i, j));
            }
            static const size_t sizes[] = { 1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8 };  // by gguf_type
            if (item >= 0 && (size_t) item < sizeof(sizes)/sizeof(sizes[0]) && sizes[item] > 0) {
                h.bytes(gguf_get_arr_data(gguf, i), n*sizes[item]);
            }
        } else {
            static const size_t sizes[] = { 1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8 };
            if (type >= 0 && (size_t) type < sizeof(sizes)/sizeof(sizes[0])) {
                h.bytes(gguf_get_val_data(gguf, i), sizes[type]);
            }
        }
    }
}

void list_tensors(const gguf_context * gguf, size_t file, std::vector<tensor> & out) {
    for (int64_t i = 0; i < gguf_get_n_tensors(gguf); ++i) {
        out.push_back({ gguf_get_tensor_name(gguf, i), gguf_get_tensor_type(gguf, i), gguf_get_tensor_size(gguf, i), file,
            gguf_get_data_offset(gguf) + gguf_get_tensor_offset(gguf, i) });
    }
}

bool seek(FILE * file, uint64_t offset) {
#ifdef _WIN32
    return _fseeki64(file, offset, SEEK_SET) == 0;
#else
    return fseeko(file, offset, SEEK_SET) == 0;
#endif
}

} // namespace

std::string tca_identity(const gguf_context * model, const std::string & path, std::string & problem) {
    const int64_t id = gguf_find_key(model, "general.architecture");
    if (id < 0 || gguf_get_kv_type(model, id) != GGUF_TYPE_STRING) {
        problem = path + ": general.architecture is missing or no string";
        return "";
    }
    const std::string arch = gguf_get_val_str(model, id);
    hasher h;
    h.text(arch.c_str());
    hash_values(h, model, arch + ".");

    std::vector<std::string> parts = { path };
    std::vector<tensor>      tensors;
    list_tensors(model, 0, tensors);
    int n_parts;
    if (const size_t length = split_ending(path, n_parts)) {
        for (int i = 2; i <= n_parts; ++i) {
            char ending[64];
            snprintf(ending, sizeof(ending), "-%05d-of-%05d.gguf", i, n_parts);
            parts.push_back(path.substr(0, path.size() - length) + ending);
            const std::unique_ptr<gguf_context, tca_gguf_deleter> part { gguf_init_from_file(parts.back().c_str(), { true, nullptr }) };
            if (!part) {
                problem = parts.back() + " cannot be read; it is a part of this model";
                return "";
            }
            list_tensors(part.get(), i - 1, tensors);
        }
    }
    std::sort(tensors.begin(), tensors.end(), [](const tensor & a, const tensor & b) { return a.name < b.name; });

    constexpr size_t n_bytes = 64, n_samples = 128;
    std::vector<const tensor *> large;  // the small ones, norms and biases, are the same in many fine-tuned models
    for (const tensor & t : tensors) {
        h.text(t.name.c_str());
        h.number(t.type);
        h.number(t.size);
        if (t.size >= 16*n_bytes) {
            large.push_back(&t);
        }
    }
    const size_t step = std::max<size_t>(1, (large.size() + n_samples - 1)/n_samples);
    std::vector<const tensor *> samples;
    for (size_t i = 0; i < large.size(); i += step) {
        samples.push_back(large[i]);
    }
    std::vector<uint8_t> data(samples.size()*n_bytes);  // in the order of the names, whatever the parts
    for (size_t file = 0; file < parts.size(); ++file) {
        const std::unique_ptr<FILE, int (*)(FILE *)> in { ggml_fopen(parts[file].c_str(), "rb"), fclose };
        if (!in) {
            problem = parts[file] + " cannot be opened";
            return "";
        }
        for (size_t i = 0; i < samples.size(); ++i) {
            const tensor & t = *samples[i];
            if (t.file == file && (!seek(in.get(), t.offset + t.size/2) || fread(&data[i*n_bytes], 1, n_bytes, in.get()) != n_bytes)) {
                problem = parts[file] + " ends inside tensor " + t.name + "; the file is incomplete";
                return "";
            }
        }
    }
    h.bytes(data.data(), data.size());
    char text[17];
    snprintf(text, sizeof(text), "%016" PRIx64, h.value);
    return text;
}

//
// which budgets
//

bool tca_source_find(const gguf_context * model, const std::string & path, tca_source & out, std::string & problem) {
    out.gguf = model;
    out.path.clear();
    out.note.clear();
    out.owned.reset();
    if (path.empty()) {
        return true;
    }
    std::string identity;
    const auto identify = [&]() {
        if (identity.empty()) {
            identity = tca_identity(model, path, problem);
        }
        return !identity.empty();
    };
    // 1: taken, 0: made for another model, -1: problem
    const auto take = [&](const std::string & file) {
        std::unique_ptr<gguf_context, tca_gguf_deleter> gguf { gguf_init_from_file(file.c_str(), { true, nullptr }) };
        if (!gguf) {
            problem = file + " is not a readable GGUF file; run embed-budgets again, or delete it";
            return -1;
        }
        const int64_t id = gguf_find_key(gguf.get(), KEY);
        if (id < 0 || gguf_get_kv_type(gguf.get(), id) != GGUF_TYPE_STRING) {
            problem = file + " does not say which model its budgets are for (" + KEY + "); write such a file with: embed-budgets MODEL --beside";
            return -1;
        }
        if (!identify()) {
            return -1;
        }
        if (identity != gguf_get_val_str(gguf.get(), id)) {
            return 0;
        }
        out.gguf  = gguf.get();
        out.owned = std::move(gguf);
        out.path  = file;
        return 1;
    };

    const char * named = getenv("TCA_BUDGETS");
    if (named && *named) {
        const std::string place = named;
        if (is_folder(place)) {
            std::string file = place + "/" + file_name(tca_beside(path));
            if (!is_file(file)) {
                if (!identify()) {
                    return false;
                }
                file = place + "/" + identity + SUFFIX;
            }
            const int taken = is_file(file) ? take(file) : 0;
            if (taken != 0) {
                return taken > 0;
            }
            out.note = "TCA_BUDGETS: " + place + " has no budgets for " + path;
        } else if (!is_file(place)) {
            problem = "TCA_BUDGETS is " + place + ", which does not exist";
            return false;
        } else {
            const int taken = take(place);
            if (taken != 0) {
                return taken > 0;
            }
            out.note = "TCA_BUDGETS: the budgets in " + place + " were made for another model than " + path;
        }
    }
    const std::string beside = tca_beside(path);
    if (is_file(beside) && beside != path) {
        const int taken = take(beside);
        if (taken == 0) {
            problem = beside + " was made for another model than " + path + "; run embed-budgets again, or delete it";
        }
        return taken > 0;
    }
    if (tca_has_keys(model)) {
        return true;
    }
    const std::string folder = tca_user_folder();
    if (!folder.empty() && is_folder(folder) && identify()) {
        const std::string file = folder + "/" + identity + SUFFIX;
        if (is_file(file)) {
            return take(file) > 0;
        }
    }
    problem.clear();  // an identity that cannot be known is no reason to refuse a model without budgets
    return true;
}
