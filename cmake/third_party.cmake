# Sets ONNXRUNTIME_INCLUDE_DIR and, for the tests, GOOGLETEST_SOURCE_DIR: what the user named, what the system has, or what
# packaging/fetch_headers.py fetches to build/headers of the source tree, where the next build finds it again. Set
# ONNXRUNTIME_RELEASE_SHA256 and GOOGLETEST_RELEASE_SHA256 in the environment to pin the release archives it may fetch.
function(dlrm_deploy_third_party what variable)
  if(${variable})
    return()
  endif()
  find_package(Python3 3.10 REQUIRED COMPONENTS Interpreter)
  set(into ${CMAKE_CURRENT_SOURCE_DIR}/build/headers)
  execute_process(COMMAND ${CMAKE_COMMAND} -E make_directory ${into} ERROR_QUIET)
  execute_process(COMMAND ${CMAKE_COMMAND} -E touch ${into}/.writable ERROR_QUIET RESULT_VARIABLE status)
  if(NOT status EQUAL 0) # a source tree that may only be read
    set(into ${CMAKE_CURRENT_BINARY_DIR}/headers)
  endif()
  execute_process(
    COMMAND ${Python3_EXECUTABLE} ${CMAKE_CURRENT_SOURCE_DIR}/packaging/fetch_headers.py ${what} --into ${into}
    OUTPUT_VARIABLE folder ERROR_VARIABLE error RESULT_VARIABLE status OUTPUT_STRIP_TRAILING_WHITESPACE)
  if(NOT status EQUAL 0)
    message(FATAL_ERROR "${error}")
  endif()
  if(error) # what was fetched, and its checksum
    string(STRIP "${error}" error)
    message(STATUS "${error}")
  endif()
  message(STATUS "${what}: ${folder}")
  set(${variable} ${folder} PARENT_SCOPE)
endfunction()

# A system package first: CMake knows more places than the script does.
find_path(ONNXRUNTIME_INCLUDE_DIR onnxruntime_cxx_api.h
  HINTS ENV ONNXRUNTIME_INCLUDE_DIR
  PATH_SUFFIXES onnxruntime onnxruntime/core/session
  DOC "Folder that holds onnxruntime_cxx_api.h")
dlrm_deploy_third_party(onnxruntime ONNXRUNTIME_INCLUDE_DIR)
if(DLRM_DEPLOY_BUILD_TESTS)
  dlrm_deploy_third_party(googletest GOOGLETEST_SOURCE_DIR)
endif()
