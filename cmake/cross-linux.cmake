# Cross-building with Debian's compilers, and running what comes out with qemu-user:
#   cmake -DCMAKE_TOOLCHAIN_FILE=cmake/cross-linux.cmake -DTCA_CROSS_TARGET=aarch64-linux-gnu ...
if(NOT TCA_CROSS_TARGET)
    message(FATAL_ERROR "cross-linux.cmake needs -DTCA_CROSS_TARGET=aarch64-linux-gnu (or another of Debian's g++-* packages)")
endif()
list(APPEND CMAKE_TRY_COMPILE_PLATFORM_VARIABLES TCA_CROSS_TARGET)
string(REGEX REPLACE "-.*" "" processor "${TCA_CROSS_TARGET}")

set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR ${processor})
set(CMAKE_C_COMPILER   ${TCA_CROSS_TARGET}-gcc)
set(CMAKE_CXX_COMPILER ${TCA_CROSS_TARGET}-g++)
set(CMAKE_CROSSCOMPILING_EMULATOR qemu-${processor} -L /usr/${TCA_CROSS_TARGET})

set(CMAKE_FIND_ROOT_PATH /usr/${TCA_CROSS_TARGET})
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_PACKAGE ONLY)
