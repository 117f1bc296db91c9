#include "edgekv-filters.h"

#include "common.h"

#include "hash/hash.h"

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <stdexcept>

namespace {

const std::string PREFIX = "edgekv.qfilters."; // of the keys in GGUF metadata

// ggml's reader forgets how many dimensions a tensor was stored with, which the fingerprint of a model has in it

struct gguf_entry {
    uint32_t          type;      // of an array: of its items
    bool              is_array;
    uint64_t          n;
    std::vector<char> data;
};

struct gguf_norm {
    std::vector<uint64_t> shape; // fastest dimension first
    std::vector<char>     data;
};

// The metadata of a GGUF file, but for arrays of strings, and its F32 tensors with "norm" in their names. Throws
// std::invalid_argument, naming the file, if it cannot be read or contradicts itself.
class gguf_header {
  public:
    enum : uint32_t { U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64, N_TYPES };

    const std::string path;

    std::map<std::string, gguf_entry> entries;
    std::map<std::string, gguf_norm>  norms; // in the order of their names' bytes

    explicit gguf_header(const std::string & path) : path(path), in(path, std::ios::binary) {
        if (!in) {
            fail(std::string("cannot be read: ") + strerror(errno));
        }
        if (std::filesystem::is_directory(path)) {
            fail("is a folder; pass a .gguf file");
        }
        in.seekg(0, std::ios::end);
        total = left = (uint64_t) std::max<std::streamoff>(0, in.tellg());
        in.seekg(0);

        char magic[4] = {};
        read(magic, std::min<uint64_t>(left, 4));
        if (memcmp(magic, "GGUF", 4) != 0) {
            fail("not a GGUF file");
        }
        const auto version = next<uint32_t>();
        if (version != 2 && version != 3) {
            fail("GGUF version " + std::to_string(version) + "; only 2 and 3 are supported");
        }
        const auto n_tensors = next<uint64_t>();
        const auto n_entries = next<uint64_t>();
        for (uint64_t i = 0; i < n_entries; ++i) { // ends at the latest at the end of the file, and so do the others
            const std::string key = next_string();
            read_entry(key);
        }
        read_norms(n_tensors);
    }

    // `why` may have names out of the file in it: of those one short line is left
    [[noreturn]] void fail(std::string why) const {
        if (why.size() > 300) {
            why = why.substr(0, 300) + "...";
        }
        std::replace_if(why.begin(), why.end(), [](char c) { return (unsigned char) c < ' ' || c == '\x7f'; }, '?');
        throw std::invalid_argument(path + ": " + why);
    }

    // NULL if there is none of that type
    const gguf_entry * find(const std::string & key, uint32_t type, bool is_array) const {
        const auto it = entries.find(key);
        const bool ok = it != entries.end() && it->second.type == type && it->second.is_array == is_array;
        return ok ? &it->second : nullptr;
    }

    std::string text(const std::string & key) const {
        const auto * e = find(key, STRING, false);
        if (!e) {
            fail("no " + key + " in the metadata; is it a language model?");
        }
        return std::string(e->data.begin(), e->data.end());
    }

    // the numbers of a key of any type of integer, one if it is no array; empty if there is no such key
    std::vector<uint64_t> integers(const std::string & key) const {
        const auto it = entries.find(key);
        if (it == entries.end()) {
            return {};
        }
        const auto & e = it->second;
        std::vector<uint64_t> res(e.n);
        for (uint64_t i = 0; i < e.n; ++i) {
            const char * at = e.data.data() + i*size_of(e.type);
            int64_t value = -1;
            switch (e.type) {
                case U8:  value = as<uint8_t> (at); break;
                case I8:  value = as<int8_t>  (at); break;
                case U16: value = as<uint16_t>(at); break;
                case I16: value = as<int16_t> (at); break;
                case U32: value = as<uint32_t>(at); break;
                case I32: value = as<int32_t> (at); break;
                case U64: value = (int64_t) as<uint64_t>(at); break;
                case I64: value = as<int64_t> (at); break;
                default: break;
            }
            if (value < 0) {
                fail("damaged GGUF file: " + key + " is not a number or one number per layer");
            }
            res[i] = (uint64_t) value;
        }
        return res;
    }

    template <typename T> static T as(const char * at) {
        T res;
        memcpy(&res, at, sizeof(T));
        return res;
    }

  private:
    std::ifstream in;
    uint64_t      total = 0;
    uint64_t      left  = 0; // behind where the file is read

    static uint64_t size_of(uint32_t type) { // 0: not fixed, or no type at all
        static const uint64_t sizes[N_TYPES] = { 1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8 };
        return type < N_TYPES ? sizes[type] : 0;
    }

    void need(uint64_t n) const {
        if (n > left) {
            fail("truncated GGUF file");
        }
    }

    void read(char * to, uint64_t n) {
        need(n);
        if (!in.read(to, (std::streamsize) n)) {
            fail("cannot be read");
        }
        left -= n;
    }

    void skip(uint64_t n) {
        need(n);
        in.ignore((std::streamsize) n); // unlike seekg it keeps what is buffered: vocabularies are many short strings
        left -= n;
    }

    std::vector<char> next_bytes(uint64_t n) {
        need(n);
        std::vector<char> res(n);
        read(res.data(), n);
        return res;
    }

    template <typename T> T next() {
        char data[sizeof(T)];
        read(data, sizeof(T));
        return as<T>(data);
    }

    std::string next_string() {
        const auto data = next_bytes(next<uint64_t>());
        return std::string(data.begin(), data.end());
    }

    void read_entry(const std::string & key) {
        gguf_entry e = { next<uint32_t>(), false, 1, {} };
        if (e.type == ARRAY) {
            e.is_array = true;
            e.type     = next<uint32_t>();
            e.n        = next<uint64_t>();
        }
        if (e.type == STRING && e.is_array) {
            for (uint64_t i = 0; i < e.n; ++i) {
                skip(next<uint64_t>());
            }
            return;
        }
        const uint64_t size = size_of(e.type);
        if (e.type != STRING && size == 0) {
            fail("metadata of type " + std::to_string(e.type) + " in " + key);
        }
        if (size > 0 && e.n > left/size) {
            fail("truncated GGUF file");
        }
        e.data = next_bytes(e.type == STRING ? next<uint64_t>() : e.n*size);
        entries[key] = std::move(e);
    }

    void read_norms(uint64_t n_tensors) {
        std::map<std::string, uint64_t> offsets;
        for (uint64_t i = 0; i < n_tensors; ++i) {
            const std::string name   = next_string();
            const auto        n_dims = next<uint32_t>();
            if (n_dims > GGML_MAX_DIMS) {
                fail("damaged GGUF file: tensor '" + name + "' has " + std::to_string(n_dims) + " dimensions");
            }
            gguf_norm norm;
            for (uint32_t d = 0; d < n_dims; ++d) {
                norm.shape.push_back(next<uint64_t>());
            }
            const auto type   = next<uint32_t>();
            const auto offset = next<uint64_t>();
            if (type == GGML_TYPE_F32 && name.find("norm") != std::string::npos) {
                offsets[name] = offset;
                norms[name]   = std::move(norm);
            }
        }

        const auto * e = find("general.alignment", U32, false);
        const uint64_t alignment = e ? as<uint32_t>(e->data.data()) : 32;
        if (alignment == 0 || (alignment & (alignment - 1)) != 0) {
            fail("damaged GGUF file: general.alignment is no power of two");
        }
        const uint64_t begin = (total - left + alignment - 1)/alignment*alignment;

        uint64_t sum = 0;
        for (auto & [name, norm] : norms) {
            uint64_t size = sizeof(float);
            for (const uint64_t dim : norm.shape) {
                if (dim != 0 && size > total/dim) {
                    fail("truncated GGUF file: tensor '" + name + "' is larger than the file");
                }
                size *= dim;
            }
            const uint64_t offset = offsets[name];
            if (begin > total || offset > total - begin || size > total - begin - offset) {
                fail("truncated GGUF file: tensor '" + name + "' ends behind the end of the file");
            }
            if ((sum += size) > total - begin) {
                fail("damaged GGUF file: tensor '" + name + "' lies on others");
            }
            in.seekg((std::streamoff) (begin + offset));
            left = total - begin - offset;
            norm.data = next_bytes(size);
        }
    }
};

std::string joined(const std::vector<uint64_t> & numbers) {
    std::string res;
    for (const uint64_t n : numbers) {
        res += (res.empty() ? "" : ",") + std::to_string(n);
    }
    return res;
}

} // namespace

std::string edgekv_model_fingerprint(const std::string & path) {
    const gguf_header file(path);
    const std::string arch = file.text("general.architecture");

    const auto one = [&](const std::string & key) {
        const auto found = file.integers(key);
        if (found.size() != 1) {
            file.fail("no " + key + " in the metadata; is it a language model?");
        }
        return found[0];
    };
    const uint64_t n_layer = one(arch + ".block_count");

    const auto per_layer = [&](const std::string & key) {
        auto found = file.integers(key);
        const auto it = file.entries.find(key);
        if (it != file.entries.end() && !it->second.is_array) {
            return std::vector<uint64_t>(std::min<uint64_t>(n_layer, 4096), found[0]);
        }
        return found;
    };
    const auto n_head = per_layer(arch + ".attention.head_count");
    auto    n_head_kv = per_layer(arch + ".attention.head_count_kv");
    if (n_head_kv.empty()) {
        n_head_kv = n_head;
    }
    if (n_layer > 4096 || n_head.size() != n_layer || n_head_kv.size() != n_layer) {
        file.fail("damaged GGUF file: the numbers of heads are not one per layer");
    }
    const auto head_size = [&](const char * which) {
        const std::string key = arch + ".attention." + which;
        if (file.entries.count(key)) {
            return one(key);
        }
        const uint64_t most = n_head.empty() ? 0 : *std::max_element(n_head.begin(), n_head.end());
        if (most == 0) {
            file.fail("damaged GGUF file: neither " + key + " nor a number of heads");
        }
        return one(arch + ".embedding_length")/most;
    };
    std::string hashed = "edgekv model 1\n" + arch + "\n" + joined(n_head) + "\n" + joined(n_head_kv) + "\n" +
                         joined({ head_size("key_length"), head_size("value_length") }) + "\n";

    // of all files of a split model
    const auto count = file.integers("split.count");
    std::map<std::string, gguf_norm> norms = file.norms;
    for (uint64_t i = 1; !count.empty() && i < count[0]; ++i) {
        std::vector<char> prefix(file.path.size() + 1);
        std::vector<char> part  (file.path.size() + 64);
        if (!llama_split_prefix(prefix.data(), prefix.size(), file.path.c_str(), 0, (int32_t) count[0])) {
            file.fail("is not named as the first of " + std::to_string(count[0]) + " parts; "
                      "give all parts their names back");
        }
        llama_split_path(part.data(), part.size(), prefix.data(), (int32_t) i, (int32_t) count[0]);
        norms.merge(gguf_header(part.data()).norms);
    }
    for (const auto & [name, norm] : norms) {
        hashed += name + " " + joined(norm.shape) + "\n";
        hashed.append(norm.data.begin(), norm.data.end());
    }
    return hash_sha256_hex(hashed.data(), hashed.size());
}

std::shared_ptr<const edgekv_filters> edgekv_read_filters(const std::string & path) {
    const gguf_header file(path);
    const auto first = file.entries.lower_bound(PREFIX);
    if (first == file.entries.end() || !string_starts_with(first->first, PREFIX)) {
        return nullptr;
    }
    const auto bad = [&](const std::string & why) {
        file.fail("damaged Q-Filters: " + why + "; make them again with edgekv convert");
    };
    const auto value = [&](const char * key, uint32_t type, bool is_array) -> const gguf_entry & {
        const auto * e = file.find(PREFIX + key, type, is_array);
        if (!e) {
            bad(PREFIX + key + " is missing or of the wrong type");
        }
        return *e;
    };
    const auto integers = [&](const char * key) {
        const auto & e = value(key, gguf_header::I32, true);
        std::vector<int32_t> res(e.n);
        std::copy(e.data.begin(), e.data.end(), (char *) res.data());
        return res;
    };

    const auto version = gguf_header::as<uint32_t>(value("version", gguf_header::U32, false).data.data());
    if (version != 1) {
        file.fail("Q-Filters of format version " + std::to_string(version) + ", this edgekv reads version 1; "
                  "update edgekv or make them again with edgekv convert");
    }
    value("sign", gguf_header::STRING, false);
    if (file.text(PREFIX + "sign") != "keep-high") {
        bad(PREFIX + "sign is not 'keep-high'");
    }

    auto res = std::make_shared<edgekv_filters>();
    res->layers = integers("layers");
    const auto   heads   = integers("head_count_kv");
    const auto   sizes   = integers("head_size");
    const auto & vectors = value("vectors", gguf_header::F32, true);
    value("model_sha256", gguf_header::STRING, false);
    res->model_sha256 = file.text(PREFIX + "model_sha256");

    const auto positive = [](int32_t n) { return n > 0; };
    if (heads.empty() || heads.size() != res->layers.size() || heads.size() != sizes.size() ||
        !std::all_of(heads.begin(), heads.end(), positive) || !std::all_of(sizes.begin(), sizes.end(), positive)) {
        bad("the layers, head counts and head sizes do not match");
    }
    res->vectors.resize(vectors.n);
    std::copy(vectors.data.begin(), vectors.data.end(), (char *) res->vectors.data());

    uint64_t at = 0;
    for (size_t i = 0; i < heads.size(); ++i) {
        const std::string where = std::to_string(res->layers[i]) + "; make them again with edgekv calibrate";
        for (int32_t h = 0; h < heads[i]; ++h, at += sizes[i]) {
            if ((uint64_t) sizes[i] > vectors.n - at) {
                bad(PREFIX + "vectors has " + std::to_string(vectors.n) + " numbers");
            }
            const auto begin = res->vectors.begin() + at;
            const auto end   = begin + sizes[i];
            if (!std::all_of(begin, end, [](float x) { return std::isfinite(x); })) {
                file.fail("Q-Filters hold NaN or infinity in layer " + where);
            }
            if (std::all_of(begin, end, [](float x) { return x == 0.0f; })) {
                file.fail("Q-Filters hold an all-zero vector in layer " + where);
            }
        }
    }
    if (at != vectors.n) {
        bad(PREFIX + "vectors has " + std::to_string(vectors.n) + " numbers");
    }
    return res;
}
