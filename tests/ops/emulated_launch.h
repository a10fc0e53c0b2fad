// What the tests call: one function a kernel, and the sizes that the host has to know.

#define LAUNCH(kernel, Arguments)                              \
    void launch_##kernel(int blocks, const Arguments* arguments) { \
        emulated::launch(kernel, blocks, *arguments);          \
    }                                                          \
    int size_of_arguments_##kernel() { return sizeof(Arguments); }

extern "C" {
LAUNCH(scan_forward, ForwardArguments)
LAUNCH(scan_segments, ForwardArguments)
LAUNCH(scan_adjoint_segments, ForwardArguments)
LAUNCH(combine_segments, CombineArguments)
LAUNCH(scan_backward, BackwardArguments)
LAUNCH(reduce_projections, ReduceArguments)
int forward_shared_bytes() { return 2 * sizeof(ProjectionTile); }
int backward_shared_bytes() { return sizeof(Shared) + (GROUPS > 1 ? sizeof(SharedOfGroups) : 0); }
}
