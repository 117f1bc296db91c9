// libFuzzer target: what llama.cpp's programs read of a GGUF without Python, ggml_ops/common/edgekv-filters.cpp. The input
// is a file, and the later parts of a split model too, where it says that it is the first of three.
// tools/fuzz compiles and runs it.

#include "edgekv-filters.h"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <stdexcept>
#include <string>
#include <unistd.h>

namespace {

// whatever is refused is refused with one line
template <typename Read> void refuses_in_one_line(Read read) {
    try {
        read();
    } catch (const std::invalid_argument & e) {
        for (const char * c = e.what(); *c; ++c) {
            if ((unsigned char) *c < ' ') {
                fprintf(stderr, "a control character in the message: %s\n", e.what());
                abort();
            }
        }
    }
}

struct files {
    std::filesystem::path folder;

    files() {
        std::string name = (std::filesystem::temp_directory_path()/"edgekv-fuzz-XXXXXX").string();
        if (!mkdtemp(&name[0])) {
            abort();
        }
        folder = name;
        for (int i = 2; i <= 3; ++i) {
            std::filesystem::create_symlink("m-00001-of-00003.gguf", folder/("m-0000" + std::to_string(i) + "-of-00003.gguf"));
        }
    }
    ~files() {
        std::error_code error;
        std::filesystem::remove_all(folder, error);
    }
};

} // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    static files where;
    static const std::string path = where.folder/"m-00001-of-00003.gguf";

    FILE * file = fopen(path.c_str(), "wb");
    if (!file || fwrite(data, 1, size, file) != size || fclose(file) != 0) {
        abort();
    }
    refuses_in_one_line([&] { edgekv_read_filters(path); });
    refuses_in_one_line([&] { edgekv_model_fingerprint(path); });
    return 0;
}
