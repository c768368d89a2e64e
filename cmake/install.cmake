# What goes into the wheel: tca_gguf/{lib,bin,_layer}, the extension, the pin and the licences, with relative rpaths.
# Component `tca` (pyproject.toml) keeps upstream's own install rules, headers and CMake packages out.

if(APPLE)
    set(origin "@loader_path")
else()
    set(origin "$ORIGIN")
endif()

# Shared libraries, and backends that are loaded at run time, defined in a folder of the build and below it.
function(tca_shared_libraries folder result)
    get_property(targets DIRECTORY ${folder} PROPERTY BUILDSYSTEM_TARGETS)
    get_property(folders DIRECTORY ${folder} PROPERTY SUBDIRECTORIES)
    set(found)
    foreach(target ${targets})
        get_target_property(type ${target} TYPE)
        if(type STREQUAL "SHARED_LIBRARY" OR type STREQUAL "MODULE_LIBRARY")
            list(APPEND found ${target})
        endif()
    endforeach()
    foreach(below ${folders})
        tca_shared_libraries(${below} more)
        list(APPEND found ${more})
    endforeach()
    set(${result} ${found} PARENT_SCOPE)
endfunction()

tca_shared_libraries(${TCA_LLAMA_DIR}/ggml libraries)  # ggml, ggml-base and every backend that is switched on
list(APPEND libraries llama)
set(programs)
if(TCA_BUILD_PROGRAMS)
    foreach(program llama-bench llama-cli llama-completion llama-gguf-split llama-imatrix llama-mtmd-cli llama-perplexity llama-quantize
            llama-server ggml-rpc-server)
        if(TARGET ${program})  # ggml-rpc-server: with GGML_RPC
            list(APPEND programs ${program})
        endif()
        if(TARGET ${program}-impl)
            list(APPEND libraries ${program}-impl)
        endif()
    endforeach()
    list(APPEND libraries llama-common mtmd)
endif()

foreach(library ${libraries})
    # No versioned names: a wheel stores a symbolic link as a copy, so libx.so -> libx.so.0 -> libx.so.0.5.0 would triple.
    set_property(TARGET ${library} PROPERTY VERSION)
    set_property(TARGET ${library} PROPERTY SOVERSION)
    set_property(TARGET ${library} PROPERTY PUBLIC_HEADER)
    set_property(TARGET ${library} PROPERTY PRIVATE_HEADER)
    set_target_properties(${library} PROPERTIES INSTALL_RPATH "${origin}")
    if(NOT library MATCHES "^(ggml|ggml-base|ggml-cpu.*|ggml-rpc|llama.*|mtmd)$")
        set_target_properties(${library} PROPERTIES INSTALL_RPATH_USE_LINK_PATH ON)  # a GPU toolkit outside the loader's path
    endif()
endforeach()
if(programs)
    set_target_properties(${programs} PROPERTIES INSTALL_RPATH "${origin}/../lib")
endif()
if(NOT TCA_SANITIZE)  # that build makes only what native/tests link
    set_target_properties(${libraries} ${programs} PROPERTIES EXCLUDE_FROM_ALL OFF)
endif()

install(TARGETS ${libraries}
    LIBRARY DESTINATION tca_gguf/lib COMPONENT tca
    RUNTIME DESTINATION tca_gguf/lib COMPONENT tca
    ARCHIVE DESTINATION tca_gguf/lib COMPONENT development)
if(programs)
    install(TARGETS ${programs} RUNTIME DESTINATION tca_gguf/bin COMPONENT tca)
endif()
if(TARGET _tca)
    set_target_properties(_tca PROPERTIES INSTALL_RPATH "${origin}/lib")
    install(TARGETS _tca LIBRARY DESTINATION tca_gguf COMPONENT tca)
endif()

install(FILES native/upstream.toml DESTINATION tca_gguf COMPONENT tca)
install(FILES native/include/tca.h DESTINATION tca_gguf/include COMPONENT tca)
install(FILES ${TCA_LLAMA_DIR}/LICENSE DESTINATION tca_gguf/lib RENAME LICENSE.llama.cpp COMPONENT tca)

# llama-cpp-python's pure-Python part, used when no llama-cpp-python of the pinned version is installed (tca_gguf/llama.py).
if(EXISTS ${TCA_LAYER_DIR}/llama_cpp/__init__.py)
    install(DIRECTORY ${TCA_LAYER_DIR}/llama_cpp DESTINATION tca_gguf/_layer COMPONENT tca
        FILES_MATCHING PATTERN "*.py" PATTERN "py.typed" PATTERN "__pycache__" EXCLUDE PATTERN "lib" EXCLUDE)
    install(FILES ${TCA_LAYER_DIR}/LICENSE.md DESTINATION tca_gguf/_layer COMPONENT tca)
endif()
