# The source step (native/scripts/upstream.py) and upstream's own build of what it gives.

set(script ${CMAKE_CURRENT_SOURCE_DIR}/native/scripts/upstream.py)
file(GLOB patches CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/native/patches/*.patch)
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS
    ${patches} ${script} ${CMAKE_CURRENT_SOURCE_DIR}/native/upstream.toml ${CMAKE_CURRENT_SOURCE_DIR}/tca_gguf/__init__.py)

set(pin ${CMAKE_CURRENT_BINARY_DIR}/upstream.cmake)
if(TCA_LLAMA_DIR)
    message(STATUS "tca-gguf: llama.cpp as it is from ${TCA_LLAMA_DIR}")
    set(command pin)
else()
    message(STATUS "tca-gguf: preparing the pinned source in ${TCA_CACHE_DIR}")
    set(command prepare --cache ${TCA_CACHE_DIR})
    if(TCA_SDIST)
        list(APPEND command --sdist ${TCA_SDIST})
    endif()
endif()
execute_process(COMMAND ${Python_EXECUTABLE} ${script} ${command} --cmake ${pin} RESULT_VARIABLE code ERROR_VARIABLE text)
if(NOT code EQUAL 0)
    string(STRIP "${text}" text)
    tca_fail("${text}")
endif()
include(${pin})
if(NOT EXISTS ${TCA_LLAMA_DIR}/src/llama-graph.cpp)
    tca_fail("TCA_LLAMA_DIR: ${TCA_LLAMA_DIR} is not a llama.cpp tree. Give the folder that holds src/ and ggml/.")
endif()
if(NOT TCA_LAYER_DIR)
    cmake_path(SET TCA_LAYER_DIR NORMALIZE ${TCA_LLAMA_DIR}/../..)  # where an unpacked sdist has llama_cpp/
endif()
message(STATUS "tca-gguf: ${TCA_UPSTREAM}, llama.cpp ${TCA_UPSTREAM_COMMIT}, patch series ${TCA_PATCH_HASH}")

# Upstream asks git which commit it is. Without a ceiling it would find ours, and rebuild at each of our commits.
set(ENV{GIT_CEILING_DIRECTORIES} ${TCA_LLAMA_DIR})
set(LLAMA_BUILD_NUMBER 0)
set(LLAMA_BUILD_COMMIT ${TCA_UPSTREAM_COMMIT})

# Layers on other machines, and ggml-rpc-server: on unless the user says otherwise. A build folder from before this default holds
# upstream's, OFF, which nobody chose.
if(NOT DEFINED CACHE{TCA_RPC_DEFAULT})
    if(NOT DEFINED CACHE{GGML_RPC} OR DEFINED CACHE{GGML_ALL_WARNINGS_3RD_PARTY})
        set(GGML_RPC ON CACHE BOOL "ggml: use RPC" FORCE)
    endif()
    set(TCA_RPC_DEFAULT ON CACHE INTERNAL "GGML_RPC got its default")
endif()

# Options of ours; everything else keeps upstream's default and can be set from CMAKE_ARGS.
set(BUILD_SHARED_LIBS    ON  CACHE BOOL "" FORCE)
set(LLAMA_CURL           OFF CACHE BOOL "" FORCE)
set(LLAMA_BUILD_COMMON   ${TCA_BUILD_PROGRAMS} CACHE BOOL "" FORCE)
set(LLAMA_BUILD_TOOLS    ${TCA_BUILD_PROGRAMS} CACHE BOOL "" FORCE)
set(LLAMA_BUILD_SERVER   ${TCA_BUILD_PROGRAMS} CACHE BOOL "" FORCE)
set(LLAMA_BUILD_UI       OFF CACHE BOOL "" FORCE)  # needs npm
set(LLAMA_USE_PREBUILT_UI OFF CACHE BOOL "" FORCE) # downloads while it builds
set(LLAMA_BUILD_TESTS    OFF CACHE BOOL "" FORCE)
set(LLAMA_BUILD_EXAMPLES OFF CACHE BOOL "" FORCE)
set(LLAMA_BUILD_APP      OFF CACHE BOOL "" FORCE)
set(GGML_CCACHE          OFF CACHE BOOL "" FORCE)  # check-tools.cmake does it
add_subdirectory(${TCA_LLAMA_DIR} ${CMAKE_CURRENT_BINARY_DIR}/llama.cpp EXCLUDE_FROM_ALL)
