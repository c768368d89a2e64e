// Where the budgets of a model are: in the model's file, or in a small GGUF file that holds nothing but keys, "<stem>.tca.gguf",
// for models whose file must not or cannot be written (a read-only or content-addressed store, a split model, 40 GB).
#pragma once

#include "gguf.h"

#include <memory>
#include <string>

struct tca_gguf_deleter {
    void operator()(gguf_context * gguf) const { gguf_free(gguf); }
};

// The one rule of which budgets a model gets. The first of these that is there is taken:
//   1. what TCA_BUDGETS names: a file, or a folder with "<stem>.tca.gguf" or "<identity>.tca.gguf" in it
//   2. "<stem>.tca.gguf" beside the model, by the path that it is opened with (a link is not followed)
//   3. the tca.* keys in the model's own file
//   4. "<identity>.tca.gguf" in the user's folder, tca_user_folder()
// <stem>: the model's file name without ".gguf" and without "-00001-of-0000N". A file of keys names the identity of the model it
// was made for; a file of 2. for another model is an error, one of 1. is passed over (it may be meant for another model that the
// same process loads), with `note` set.
struct tca_source {
    const gguf_context * gguf = nullptr;  // where the tca.* keys are, if there are any; borrowed from the model or `owned`
    std::string          path;            // of the file of keys; empty: the model's own file
    std::string          note;            // one line to be logged, or empty
    std::unique_ptr<gguf_context, tca_gguf_deleter> owned;
};

// path: the model's file, the first one of a split model; empty if the model does not come from a file, which then has its own
// keys only. False and `problem` set if what is there cannot be taken.
bool tca_source_find(const gguf_context * model, const std::string & path, tca_source & out, std::string & problem);

// What tells one model's weights from another's, 16 hex digits: architecture, hyperparameters, names, types and sizes of the
// tensors, and 64 bytes out of up to 128 of them. The same for a split model and the merged one; names, templates, tokenizers
// and budgets do not count. It guards against mix-ups, not against attacks. Empty and `problem` set on failure.
std::string tca_identity(const gguf_context * model, const std::string & path, std::string & problem);

// "<folder>/<stem>.tca.gguf" beside a model file.
std::string tca_beside(const std::string & path);

// $XDG_DATA_HOME/tca-gguf, else ~/.local/share/tca-gguf (%LOCALAPPDATA%\tca-gguf on Windows); empty if neither is known.
std::string tca_user_folder();
