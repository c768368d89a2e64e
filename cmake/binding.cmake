# tca_gguf._tca: cffi in API mode. _ffi_build.py writes the C file, the compiler checks every declaration against tca.h.

set(declarations ${CMAKE_CURRENT_SOURCE_DIR}/tca_gguf/_ffi.cdef.txt)
set(generator    ${CMAKE_CURRENT_SOURCE_DIR}/tca_gguf/_ffi_build.py)
set(generated    ${CMAKE_CURRENT_BINARY_DIR}/_tca.c)
add_custom_command(
    OUTPUT ${generated}
    COMMAND ${Python_EXECUTABLE} ${generator} ${generated}
    DEPENDS ${declarations} ${generator}
    COMMENT "Generating the binding of tca.h"
    VERBATIM)

python_add_library(_tca MODULE WITH_SOABI ${generated})
target_include_directories(_tca PRIVATE ${CMAKE_CURRENT_SOURCE_DIR}/native/include)
target_link_libraries(_tca PRIVATE llama)
