# Fails where an object compiled for one instruction set holds code that the linker may share with the others: inline
# functions and templates of headers (kernels/kernel_path.h says what that would do).
#   cmake -DNM=nm -DOBJECTS=a.o;b.o -P no_shared_code.cmake
list(LENGTH OBJECTS count)
if(count EQUAL 0)
  message(FATAL_ERROR "no objects are named")
endif()
foreach(object IN LISTS OBJECTS)
  execute_process(COMMAND ${NM} --defined-only ${object} OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
  if(NOT symbols MATCHES " T ")
    message(FATAL_ERROR "${object} defines no function: is it one?")
  endif()
  string(REGEX MATCHALL "[^\n]* [WVu] [^\n]*" shared "${symbols}")
  if(shared)
    message(FATAL_ERROR "${object} defines ${shared}")
  endif()
endforeach()
