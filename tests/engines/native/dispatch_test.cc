#include "kernels/dispatch.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <string>

namespace dlrm_deploy {
namespace {

TEST(Dispatch, TheFastestSupportedPathIsTheDefault) {
  std::string error;
  const KernelPath* chosen = ChooseKernelPath(nullptr, &error);
  ASSERT_NE(chosen, nullptr);
  for (const KernelPath& path : AllKernelPaths()) {
    if (!path.supported()) continue;
    EXPECT_STREQ(chosen->name, path.name);
    break;
  }
}

TEST(Dispatch, EverySupportedPathCanBePinnedByName) {
  for (const KernelPath& path : AllKernelPaths()) {
    std::string error;
    const KernelPath* chosen = ChooseKernelPath(path.name, &error);
    if (path.supported()) {
      EXPECT_EQ(chosen, &path);
    } else {
      EXPECT_EQ(chosen, nullptr);
      EXPECT_NE(error.find("is not supported by this CPU and its operating system"),
                std::string::npos)
          << error;
    }
  }
  EXPECT_STREQ(AllKernelPaths().back().name, "scalar");
  EXPECT_TRUE(AllKernelPaths().back().supported());
}

TEST(Dispatch, AnUnknownNameInTheEnvironmentIsRefusedAndTheKnownOnesAreListed) {
  ASSERT_EQ(setenv("DLRM_DEPLOY_KERNEL", "sse9", 1), 0);
  std::string error;
  EXPECT_EQ(ChooseKernelPathFromEnvironment(&error), nullptr);
  EXPECT_EQ(error.find("DLRM_DEPLOY_KERNEL: kernel path \"sse9\" is not one"), 0u) << error;
  EXPECT_NE(error.find("scalar"), std::string::npos) << error;
  ASSERT_EQ(setenv("DLRM_DEPLOY_KERNEL", "scalar", 1), 0);
  EXPECT_STREQ(ChooseKernelPathFromEnvironment(&error)->name, "scalar");
  ASSERT_EQ(unsetenv("DLRM_DEPLOY_KERNEL"), 0);
}

}  // namespace
}  // namespace dlrm_deploy
