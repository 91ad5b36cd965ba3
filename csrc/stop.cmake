# Where CMake stops, setup.py ends with one line that names cause and remedy. This file passes it on.

set(FASTLARS_WHY ${CMAKE_BINARY_DIR}/why_cmake_stopped.txt)

# From here on, CMake stops for this reason alone. An empty text: for any.
function(fastlars_if_it_stops text)
  file(WRITE ${FASTLARS_WHY} "${text}")
  if(NOT text)
    file(REMOVE ${FASTLARS_WHY})
  endif()
endfunction()

function(fastlars_stop text)
  fastlars_if_it_stops("${text}")
  message(FATAL_ERROR "${text}")
endfunction()
