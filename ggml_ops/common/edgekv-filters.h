#pragma once

// Q-Filters in a GGUF file, and the model that they were made for. Both functions throw std::invalid_argument with one line
// that names the file.

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

// As edgekv/filters.py stores them in GGUF metadata.
struct edgekv_filters {
    std::vector<float>   vectors; // layer by layer, in a layer KV head by KV head; a higher projection means: keep
    std::vector<int32_t> layers;  // of the model
    std::string          model_sha256;
};

// NULL if the file has none
std::shared_ptr<const edgekv_filters> edgekv_read_filters(const std::string & path);

// model_fingerprint() of edgekv/filters.py, over all files of a split model
std::string edgekv_model_fingerprint(const std::string & path);
