# Compilers, Python and the options we cannot serve. Each failure is one message that says what to do.

# FATAL_ERROR wraps and indents text; joined lines keep it one paragraph.
function(tca_fail)
    string(JOIN " " text ${ARGV})
    message(FATAL_ERROR "tca-gguf: ${text}")
endfunction()

include(CheckLanguage)
foreach(language C CXX)
    check_language(${language})
    if(NOT CMAKE_${language}_COMPILER)
        tca_fail("No C and C++ compiler was found. Install one (Debian, Ubuntu: apt install g++;"
                 "Fedora: dnf install gcc-c++; macOS: xcode-select --install) or point CC and CXX to it.")
    endif()
endforeach()
enable_language(C)
enable_language(CXX)
if(CMAKE_SIZEOF_VOID_P LESS 8)
    tca_fail("${CMAKE_CXX_COMPILER} makes 32-bit code, which llama.cpp no longer supports well. Use a 64-bit compiler.")
endif()

if(GGML_BACKEND_DL AND TCA_BUILD_TESTS)
    tca_fail("TCA_BUILD_TESTS=ON needs backends that are linked: native/tests call their kernels."
             "Configure with -DGGML_BACKEND_DL=OFF.")
endif()
if(DEFINED BUILD_SHARED_LIBS AND NOT BUILD_SHARED_LIBS)
    tca_fail("BUILD_SHARED_LIBS=OFF is not supported: the programs, the binding and llama-cpp-python share one libllama."
             "Configure with -DBUILD_SHARED_LIBS=ON.")
endif()

if(SKBUILD AND NOT Python_EXECUTABLE)
    set(Python_EXECUTABLE ${PYTHON_EXECUTABLE})
endif()
set(Python_FIND_VIRTUALENV FIRST)
if(TCA_BUILD_BINDING)
    find_package(Python 3.10 QUIET COMPONENTS Interpreter Development.Module)
else()
    find_package(Python 3.10 QUIET COMPONENTS Interpreter)
endif()
if(NOT Python_Interpreter_FOUND)
    tca_fail("No Python 3.10 or newer was found. Install one (apt install python3) or set -DPython_EXECUTABLE=/path/to/python.")
endif()
if(TCA_BUILD_BINDING)
    if(NOT Python_Development.Module_FOUND)
        tca_fail("The C headers of ${Python_EXECUTABLE} (Python.h) are missing."
                 "Install them (Debian, Ubuntu: apt install python3-dev; Fedora: dnf install python3-devel).")
    endif()
    execute_process(COMMAND ${Python_EXECUTABLE} -c "import cffi" RESULT_VARIABLE code OUTPUT_QUIET ERROR_QUIET)
    if(NOT code EQUAL 0)
        tca_fail("${Python_EXECUTABLE} has no cffi, which the binding is made with."
                 "Install it with: ${Python_EXECUTABLE} -m pip install cffi")
    endif()
endif()

if(NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
    set(CMAKE_BUILD_TYPE Release CACHE STRING "Build type" FORCE)
endif()

# ccache, if it is there: a rebuild in another clone or after a change of the series then takes seconds. Paths below the
# checkout are hashed relative to it, so that clones share entries. What -march=native means is hashed too: a cache that
# moves to another processor must not hand out code for the old one.
find_program(TCA_CCACHE ccache)
mark_as_advanced(TCA_CCACHE)
if(TCA_CCACHE AND NOT CMAKE_C_COMPILER_LAUNCHER AND NOT CMAKE_CXX_COMPILER_LAUNCHER)
    set(native ${CMAKE_BINARY_DIR}/native-target.txt)
    execute_process(COMMAND ${CMAKE_C_COMPILER} -march=native -dM -E -x c /dev/null OUTPUT_FILE ${native} ERROR_QUIET)
    foreach(language C CXX CUDA)
        set(CMAKE_${language}_COMPILER_LAUNCHER ${CMAKE_COMMAND} -E env CCACHE_BASEDIR=${CMAKE_SOURCE_DIR} CCACHE_NOHASHDIR=1
            CCACHE_EXTRAFILES=${native} CCACHE_SLOPPINESS=locale ${TCA_CCACHE})
    endforeach()
endif()

if(TCA_SANITIZE)
    add_compile_options(-fsanitize=address,undefined -fno-omit-frame-pointer -fno-sanitize-recover=undefined -O1 -g1)
    add_link_options(-fsanitize=address,undefined)
endif()
