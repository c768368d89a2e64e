// The one place where the C API's error text is set.
#pragma once

#include "tca.h"

#include <string>

// Stores the text for tca_last_error() and returns `status`.
tca_status tca_fail(tca_status status, const std::string & message);
