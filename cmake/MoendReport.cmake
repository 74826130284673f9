# The page of `moend report` inside the program: its own files and the plotting library that
# scripts/fetch-report-plots has put into .deps/. Without the library everything builds, and `moend report` says
# what is missing.
set(report_dir ${PROJECT_SOURCE_DIR}/src/moend/eval/report)
set(report_plots ${PROJECT_SOURCE_DIR}/.deps/report/plots.js)
set(report_files page=${report_dir}/page.html style=${report_dir}/report.css script=${report_dir}/report.js)
set(report_depends ${report_dir}/page.html ${report_dir}/report.css ${report_dir}/report.js)
if(EXISTS ${report_plots})
  list(APPEND report_files plots=${report_plots})
  list(APPEND report_depends ${report_plots})
else()
  message(STATUS "moend report will have no plots: run scripts/fetch-report-plots and configure again")
  list(APPEND report_files plots=)
endif()
add_custom_command(
  OUTPUT ${PROJECT_BINARY_DIR}/generated/report_assets.cpp
  COMMAND ${CMAKE_COMMAND} -DOUT=${PROJECT_BINARY_DIR}/generated/report_assets.cpp
          -DHEADER=moend/eval/report_assets.h -DNAMESPACE=moend::eval::assets "-DFILES=${report_files}" -P
          ${PROJECT_SOURCE_DIR}/cmake/EmbedText.cmake
  DEPENDS ${report_depends} ${PROJECT_SOURCE_DIR}/cmake/EmbedText.cmake
  VERBATIM)
target_sources(moend_eval PRIVATE ${PROJECT_BINARY_DIR}/generated/report_assets.cpp)
