#!/bin/sh
# Builds the addon with AddressSanitizer and UndefinedBehaviorSanitizer into build-asan/ and runs asan-exercise.ts with it.
# Exit status 77: this machine cannot (no cmake, no libasan).
set -eu
cd "$(dirname "$0")/../.."
PATH="$PWD/node_modules/.bin:$PATH"
command -v cmake >/dev/null && command -v c++ >/dev/null || { echo "asan.sh: needs cmake and c++"; exit 77; }
libasan=$(c++ -print-file-name=libasan.so)
case "$libasan" in /*) ;; *) echo "asan.sh: needs libasan"; exit 77 ;; esac

cmake -S . -B build-asan -DVIRTIOD_SANITIZE=ON >/dev/null
cmake --build build-asan --parallel >/dev/null
# Generated files that neither git nor a linter should look at: make's timestamps end in .ts.
echo '*' >build-asan/.gitignore
find build-asan -name '*.ts' -delete

# Node leaks by design. The guard needs its own SIGBUS handler, V8's traps their SIGSEGV. The quarantine is small: memory is
# Node's, errors are ours. Node is started directly, so that no shell or npm runs under the preload.
VIRTIOD_NATIVE_PATH="$PWD/build-asan/virtiod_native.node" \
LD_PRELOAD="$(readlink -f "$libasan") $(readlink -f "$(c++ -print-file-name=libubsan.so)") $(readlink -f "$(c++ -print-file-name=libstdc++.so)")" \
ASAN_OPTIONS=detect_leaks=0:handle_segv=0:handle_sigbus=0:allow_user_segv_handler=1:abort_on_error=0:exitcode=99 \
UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1:exitcode=98 \
exec node --expose-gc test/native/asan-exercise.ts "$@"
