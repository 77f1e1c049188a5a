// The functions of kernels.cpp as a module of Python, without what a general caller of C functions spends on each argument:
// that takes longer than a small map. Included by kernels.cpp.
//
// A pointer is passed as None, as a number, or as what has a method data_ptr: a tensor, which is not looked at any further.

namespace {

PyObject* data_ptr_name = nullptr;

// an argument as a function takes it; false where that fails, with an exception set
template <class T>
bool convert(PyObject* given, T& to) {
    if constexpr (std::is_floating_point_v<T>) {
        const double value = PyFloat_AsDouble(given);
        to = T(value);
        return value != -1 || !PyErr_Occurred();
    } else if constexpr (!std::is_pointer_v<T>) {
        const long long value = PyLong_AsLongLong(given);
        to = T(value);
        return value != -1 || !PyErr_Occurred();
    } else if (given == Py_None) {
        to = nullptr;
        return true;
    } else {
        const bool is_number = PyLong_Check(given);
        PyObject* found = is_number ? given : PyObject_CallMethodObjArgs(given, data_ptr_name, nullptr);
        if (!found) return false;
        to = static_cast<T>(PyLong_AsVoidPtr(found));
        if (!is_number) Py_DECREF(found);
        return to || !PyErr_Occurred();
    }
}

// the arguments are converted one after the other, and the function is called while other threads of Python may run
template <class Result, class... T, size_t... I>
PyObject* called(Result (*function)(T...), PyObject* const* given, Py_ssize_t count, std::index_sequence<I...>) {
    if (count != Py_ssize_t(sizeof...(T)))
        return PyErr_Format(PyExc_TypeError, "expected %d arguments, got %zd", int(sizeof...(T)), count);
    std::tuple<T...> all;
    if (!(convert(given[I], std::get<I>(all)) && ...)) return nullptr;
    PyThreadState* state = PyEval_SaveThread();
    long result = 0;
    if constexpr (std::is_void_v<Result>) std::apply(function, all);
    else result = std::apply(function, all);
    PyEval_RestoreThread(state);
    if constexpr (std::is_void_v<Result>) Py_RETURN_NONE;
    else return PyLong_FromLong(result);
}
template <class Result, class... T>
PyObject* called(Result (*function)(T...), PyObject* const* given, Py_ssize_t count) {
    return called(function, given, count, std::index_sequence_for<T...>{});
}
template <auto FUNCTION>
PyObject* method(PyObject*, PyObject* const* given, Py_ssize_t count) {
    return called(FUNCTION, given, count);
}

#define METHOD(name) \
    {#name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&method<convattn_##name>)), METH_FASTCALL, nullptr},
#define ON_MAPS(type, suffix) \
    METHOD(pool_##suffix) METHOD(statistics_##suffix) METHOD(summarise_##suffix) METHOD(apply_##suffix) \
    METHOD(grad_gates_##suffix) METHOD(grad_summary_##suffix) METHOD(grad_input_##suffix) METHOD(gated_##suffix) \
    METHOD(grad_gated_##suffix)
PyMethodDef methods[] = {
    BOTH(ON_MAPS) METHOD(normalise) METHOD(follow) METHOD(window) METHOD(grad_window) METHOD(mlp) METHOD(grad_mlp)
    METHOD(threads) METHOD(path) {nullptr, nullptr, 0, nullptr}};
PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_kernels", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__kernels() {
    data_ptr_name = PyUnicode_InternFromString("data_ptr");
    return data_ptr_name ? PyModule_Create(&definition) : nullptr;
}
