#pragma once

#include <string>

// Folder of libggml, where the backends of this build lie (UTF-8). Empty if backends are not loaded at run time, or if the system
// cannot tell.
std::string tca_library_dir();
