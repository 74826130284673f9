# The text that `moend calibrate` measures on when no other is given, inside the library.
add_custom_command(
  OUTPUT ${PROJECT_BINARY_DIR}/generated/calibration_text.cpp
  COMMAND ${CMAKE_COMMAND} -DOUT=${PROJECT_BINARY_DIR}/generated/calibration_text.cpp
          -DHEADER=moend/calibrate/text_assets.h -DNAMESPACE=moend::assets
          "-DFILES=mixed_text=${PROJECT_SOURCE_DIR}/models/calibration-mixed.txt" -P
          ${PROJECT_SOURCE_DIR}/cmake/EmbedText.cmake
  DEPENDS ${PROJECT_SOURCE_DIR}/models/calibration-mixed.txt ${PROJECT_SOURCE_DIR}/cmake/EmbedText.cmake
  VERBATIM)
target_sources(moend_calibrate PRIVATE ${PROJECT_BINARY_DIR}/generated/calibration_text.cpp)
