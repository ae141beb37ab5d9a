# Warnings for our own sources, as a target so that third-party ones stay out of it.
add_library(dlrm_deploy_warnings INTERFACE)
target_compile_options(dlrm_deploy_warnings INTERFACE -Wall -Wextra -Wshadow -Wvla)
if(DLRM_DEPLOY_WERROR)
  target_compile_options(dlrm_deploy_warnings INTERFACE -Werror)
endif()
