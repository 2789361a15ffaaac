# AddressSanitizer and UndefinedBehaviorSanitizer, stopping at the first finding. CONTRIBUTING.md
# says how to run the tests with them.
option(FITCOMPRESS_SANITIZE "Build with address and undefined-behaviour sanitizers" OFF)
if(FITCOMPRESS_SANITIZE)
  set(sanitize_flags -fsanitize=address,undefined -fno-sanitize-recover=all)
  # After -O3 of all targets, so that this level counts.
  target_compile_options(fitcompress_options INTERFACE
    $<$<COMPILE_LANGUAGE:CXX>:${sanitize_flags} -O1 -g -fno-omit-frame-pointer>)
  target_link_options(fitcompress_options INTERFACE ${sanitize_flags})
endif()
